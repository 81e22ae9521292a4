//! Full disks, killed writers and targets that cannot be replaced.
//!
//! A limit on the size of files and a kill strike whole processes, so those tests run this program again as the victim.

#![cfg(unix)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use peftrs_core::checkpoint::{ADAPTER_CONFIG, ADAPTER_WEIGHTS};
use peftrs_core::error::Error;
use tempfile::tempdir;

use crate::support::{assert_version, names, save, weights};

/// Names the folder that a victim works in.
const FOLDER: &str = "PEFTRS_TEST_FOLDER";

/// A file by which a victim tells that it did its part.
const RAN: &str = "ran";

fn victim(test: &str, folder: &Path, shell: &str) -> Child {
    let program = std::env::current_exe().unwrap();
    let command = format!("{shell} exec \"$0\" --exact faults::{test}");
    let mut child = Command::new("sh");
    child.args(["-c", &command]).arg(program).env(FOLDER, folder).stdout(Stdio::null()).spawn().unwrap()
}

/// Where to work, if this is a victim and not the run of all tests.
fn folder() -> Option<PathBuf> {
    std::env::var_os(FOLDER).map(PathBuf::from)
}

#[test]
fn a_full_disk_leaves_what_was_there() {
    let folder = tempdir().unwrap();
    let (old, new) = (folder.path().join("old"), folder.path().join("new"));
    save(&old, 1, true).unwrap();
    // The tensor takes 200,000 bytes; the limit counts blocks of 512 or 1,024.
    let status = victim("saves_beyond_the_limit", folder.path(), "ulimit -f 50; trap '' XFSZ;").wait().unwrap();
    assert!(status.success());
    assert!(folder.path().join(RAN).exists(), "the victim did not run");
    assert_version(&old, 1);
    assert_eq!(names(&old), ["README.md", ADAPTER_CONFIG, ADAPTER_WEIGHTS]);
    assert!(!new.exists());
}

/// The victim of the test above.
#[test]
fn saves_beyond_the_limit() {
    let Some(folder) = folder() else { return };
    for name in ["old", "new"] {
        let error = save(&folder.join(name), 2, true).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::Storage { action: "write", .. }), "{text}");
        assert!(text.contains(&format!("{name}/{ADAPTER_WEIGHTS}: cannot write: ")), "{text}");
    }
    std::fs::write(folder.join(RAN), "").unwrap();
}

#[test]
fn a_killed_writer_leaves_one_version_or_a_mixture_that_is_told() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("adapter");
    save(&path, 1, true).unwrap();
    for round in 0..20 {
        let mut child = victim("saves_for_ever", &path, "");
        std::thread::sleep(Duration::from_millis(20 + round * 3));
        child.kill().unwrap();
        child.wait().unwrap();
        match weights(&path) {
            Ok(version) => assert_version(&path, version),
            Err(error) => assert!(error.to_string().contains("cut short"), "{error}"),
        }
    }
    save(&path, 3, true).unwrap();
    assert_version(&path, 3);
}

/// The victim of the test above.
#[test]
fn saves_for_ever() {
    let Some(folder) = folder() else { return };
    loop {
        for version in [1, 2] {
            save(&folder, version, false).unwrap();
        }
    }
}

#[test]
fn a_target_that_cannot_be_replaced_stops_all() {
    let folder = tempdir().unwrap();
    for blocked in [ADAPTER_CONFIG, ADAPTER_WEIGHTS, "README.md"] {
        let path = folder.path().join(blocked.replace('.', "_"));
        save(&path, 1, false).unwrap();
        std::fs::remove_file(path.join(blocked)).unwrap();
        std::fs::create_dir(path.join(blocked)).unwrap();
        let contents = || names(&path).into_iter().map(|name| std::fs::read(path.join(name)).ok()).collect::<Vec<_>>();
        let before = contents();
        let message = save(&path, 2, false).unwrap_err().to_string();
        assert!(message.contains(blocked), "{message}");
        assert!(message.ends_with("is a folder where a file is to be written"), "{message}");
        assert!(before.len() == 3 && contents() == before);
    }
}

#[test]
fn a_folder_that_cannot_be_made_is_named() {
    let folder = tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let message = save(&file.join("adapter"), 1, false).unwrap_err().to_string();
    assert!(message.starts_with(&format!("{}/adapter: cannot make the folder: ", file.display())), "{message}");
    assert_eq!(names(folder.path()), ["file"]);
}
