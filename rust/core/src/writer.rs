//! Writing safetensors files and folders.
