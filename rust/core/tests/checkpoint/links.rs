//! Symbolic links in a checkpoint's folder.

#![cfg(unix)]

use std::os::unix::fs::symlink;
use std::path::Path;

use peftrs_core::checkpoint::{ADAPTER_WEIGHTS, Checkpoint, Links};
use tempfile::tempdir;

use crate::support::{assert_says, refusal, tensors, write};

fn link(target: impl AsRef<Path>, at: &Path) {
    std::fs::create_dir_all(at.parent().unwrap()).unwrap();
    let _ = std::fs::remove_file(at);
    symlink(target, at).unwrap();
}

#[test]
fn a_link_that_leaves_the_folder_is_followed_only_on_request() {
    let folder = tempdir().unwrap();
    let (secret, adapter) = (folder.path().join("secret"), folder.path().join("adapter"));
    write(&secret, tensors(&["a"]));
    let weights = adapter.join(ADAPTER_WEIGHTS);
    let inner = adapter.join("inner");
    link("..", &inner);
    for target in [Path::new("../secret"), &secret, Path::new("inner/secret"), Path::new("/proc/self/exe")] {
        link(target, &weights);
        let refused = refusal(Checkpoint::open_adapter(&adapter, Links::Confined), &weights);
        assert_says(&refused, "is a link that leaves the folder");
    }
    link("../secret", &weights);
    assert_eq!(Checkpoint::open_adapter(&adapter, Links::Follow).unwrap().names().count(), 1);
}

#[test]
fn a_link_within_the_folder_is_followed() {
    let folder = tempdir().unwrap();
    write(&folder.path().join("deep/file"), tensors(&["a"]));
    link("deep/file", &folder.path().join(ADAPTER_WEIGHTS));
    Checkpoint::open_adapter(folder.path(), Links::Confined).unwrap();
    // The caller's own way to the folder may lead over links.
    let way = tempdir().unwrap();
    link(folder.path(), &way.path().join("way"));
    Checkpoint::open_adapter(&way.path().join("way"), Links::Confined).unwrap();
}

#[test]
fn the_hugging_face_cache_works_and_ends_at_its_repository() {
    let cache = tempdir().unwrap();
    let repository = cache.path().join("models--someone--adapter");
    write(&repository.join("blobs/0123"), tensors(&["a"]));
    write(&cache.path().join("models--other--adapter/blobs/4567"), tensors(&["b"]));
    let snapshot = repository.join("snapshots/89ab");
    link("../../blobs/0123", &snapshot.join(ADAPTER_WEIGHTS));
    link("../../../blobs/0123", &snapshot.join("checkpoint").join(ADAPTER_WEIGHTS));
    for folder in [&snapshot, &snapshot.join("checkpoint")] {
        Checkpoint::open_adapter(folder, Links::Confined).unwrap();
    }
    link("../../../models--other--adapter/blobs/4567", &snapshot.join(ADAPTER_WEIGHTS));
    let refused = refusal(Checkpoint::open_adapter(&snapshot, Links::Confined), &snapshot.join(ADAPTER_WEIGHTS));
    assert_says(&refused, "is a link that leaves the folder");
}

#[test]
fn a_link_to_nothing_or_to_itself_is_not_a_missing_file() {
    let folder = tempdir().unwrap();
    let weights = folder.path().join(ADAPTER_WEIGHTS);
    for target in ["nothing", ADAPTER_WEIGHTS] {
        link(target, &weights);
        for links in [Links::Confined, Links::Follow] {
            assert_says(&refusal(Checkpoint::open_adapter(folder.path(), links), &weights), "cannot open");
        }
    }
}
