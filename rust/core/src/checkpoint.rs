//! Reading safetensors files and folders.
