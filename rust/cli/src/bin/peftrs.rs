//! The binary over [`peftrs_cli::tool::run`]: what takes Python it refuses.

fn main() {
    let arguments: Vec<String> =
        std::env::args_os().skip(1).map(|argument| argument.to_string_lossy().into_owned()).collect();
    std::process::exit(peftrs_cli::tool::run(&arguments, None));
}
