//! Adapter checkpoints, target matching and merging: the core of peftrs, without Python.
//!
//! Rooms, each importing only those above it: [`error`], [`dtype`], [`threads`] (those that work is spread over), [`checkpoint`] (reading safetensors folders),
//! [`writer`] (writing them), [`pattern`] (Python's regular expressions), [`config`] (adapter configs), [`keys`] (the key
//! grammar), [`target`] (which modules an adapter is for), [`kernels`] (arithmetic on blocks of weights), [`inspect`] (what
//! adapters and checkpoints hold), [`outline`] (a model's layers), [`quantized`] (weights of fewer bits, read as floats), [`plan`] (what a merge will do) [`merge`] and
//! [`verify`] (whether a checkpoint is a merge).

pub mod checkpoint;
pub mod config;
pub mod dtype;
pub mod error;
pub mod inspect;
pub mod kernels;
pub mod keys;
pub mod merge;
pub mod outline;
pub mod pattern;
pub mod plan;
pub mod quantized;
pub mod target;
pub mod threads;
pub mod verify;
pub mod writer;
