//! The binary over [`peftrs_cli::run`].

fn main() {
    let arguments: Vec<String> =
        std::env::args_os().skip(1).map(|argument| argument.to_string_lossy().into_owned()).collect();
    std::process::exit(peftrs_cli::run(&arguments));
}
