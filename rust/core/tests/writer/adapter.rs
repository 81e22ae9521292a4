//! The folder of an adapter when all goes well, and input that is refused before anything is written.

use std::collections::BTreeMap;

use peftrs_core::checkpoint::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoint, Links};
use peftrs_core::dtype::Dtype;
use peftrs_core::writer::{Disk, Tensor, header, write_adapter};
use proptest::prelude::*;
use tempfile::tempdir;

use crate::support::{assert_version, names, save, weights};

#[test]
fn what_is_written_is_read_back_and_replaced() {
    let folder = tempdir().unwrap();
    let adapter = folder.path().join("new/adapter");
    for (version, sync) in [(1, true), (2, false)] {
        save(&adapter, version, sync).unwrap();
        assert_version(&adapter, version);
        assert_eq!(names(&adapter), ["README.md", ADAPTER_CONFIG, ADAPTER_WEIGHTS]);
    }
}

#[test]
fn other_files_stay() {
    let folder = tempdir().unwrap();
    std::fs::write(folder.path().join("notes.txt"), "mine").unwrap();
    save(folder.path(), 1, false).unwrap();
    assert_eq!(std::fs::read_to_string(folder.path().join("notes.txt")).unwrap(), "mine");
}

#[test]
fn the_weights_say_whose_they_are_and_of_which_config() {
    let folder = tempdir().unwrap();
    write_adapter(&Disk, folder.path(), "{}", &[], &[], &[], false).unwrap();
    let checkpoint = Checkpoint::open_adapter(folder.path(), Links::Confined).unwrap();
    let digest = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a";
    let expected = [("config_sha256", digest), ("format", "pt")].map(|(key, value)| (key.to_owned(), value.to_owned()));
    assert_eq!(checkpoint.metadata(), &BTreeMap::from(expected));
}

#[test]
fn notes_stand_beside_them_and_cannot_take_their_names() {
    let folder = tempdir().unwrap();
    write_adapter(&Disk, folder.path(), "{}", &[], &[], &[("base", "{\"a\": \"é\"}")], false).unwrap();
    let checkpoint = Checkpoint::open_adapter(folder.path(), Links::Confined).unwrap();
    assert_eq!(checkpoint.metadata()["base"], "{\"a\": \"é\"}");
    assert_eq!(checkpoint.metadata().len(), 3);
    for key in ["format", "config_sha256"] {
        let error = write_adapter(&Disk, &folder.path().join("new"), "{}", &[], &[], &[(key, "x")], false).unwrap_err();
        assert!(error.to_string().contains(&format!("`{key}` is not for notes")), "{error}");
    }
    assert_eq!(names(folder.path()), [ADAPTER_CONFIG, ADAPTER_WEIGHTS]);
}

fn shape(elements: usize) -> [usize; 1] {
    [elements]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_order_of_the_tensors_changes_no_byte(
        tensors in prop::collection::btree_map("[a-z.]{1,8}", (prop::bool::ANY, 1_usize..5), 1..8),
        seed in any::<u64>(),
    ) {
        let folder = tempdir().unwrap();
        let shapes: Vec<_> = tensors.values().map(|(_, elements)| shape(*elements)).collect();
        let given = |((name, (wide, elements)), shape): ((_, &(bool, usize)), _)| {
            let (dtype, bytes): (_, &[u8]) = if *wide { (Dtype::F32, &[1; 16]) } else { (Dtype::F16, &[2; 8]) };
            Tensor { name, dtype, shape, data: &bytes[..elements * dtype.size()] }
        };
        let mut list: Vec<Tensor<'_>> =
            tensors.iter().map(|(name, of)| (name.as_str(), of)).zip(shapes.iter().map(<[usize; 1]>::as_slice)).map(given).collect();
        write_adapter(&Disk, &folder.path().join("a"), "{}", &list, &[], &[], false).unwrap();
        let turn = usize::try_from(seed % list.len() as u64).unwrap();
        list.rotate_left(turn);
        write_adapter(&Disk, &folder.path().join("b"), "{}", &list, &[], &[], false).unwrap();
        let bytes = |name: &str| std::fs::read(folder.path().join(name).join(ADAPTER_WEIGHTS)).unwrap();
        prop_assert!(bytes("a") == bytes("b"));
        let checkpoint = Checkpoint::open_adapter(&folder.path().join("a"), Links::Confined).unwrap();
        for tensor in &list {
            prop_assert_eq!(checkpoint.read(tensor.name).unwrap(), tensor.data);
            let start = checkpoint.entry(tensor.name).unwrap().start();
            prop_assert_eq!(start % tensor.dtype.size() as u64, 0, "a mapped tensor has to be aligned");
        }
        let bytes = bytes("a");
        let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        for tensor in &list {
            prop_assert_eq!(theirs.tensor(tensor.name).unwrap().data(), tensor.data);
        }
    }
}

#[test]
fn input_that_does_not_fit_is_refused_and_nothing_is_made() {
    let folder = tempdir().unwrap();
    let adapter = folder.path().join("new/adapter");
    let tensor = |name, shape, data| Tensor { name, dtype: Dtype::F32, shape, data };
    let four = [0; 4];
    for (tensors, files, wanted) in [
        (vec![tensor("t", &[2], &four)], vec![], "tensor `t` of shape [2] and F32 takes 8 bytes, 4 were given"),
        (vec![tensor("t", &[1], &four); 2], vec![], "tensor `t`: the name is taken"),
        (vec![tensor("__metadata__", &[1], &four)], vec![], "the name is taken"),
        (vec![tensor("t", &[1 << 62], &four)], vec![], "is larger than can be"),
        (vec![tensor("t", &[usize::MAX, 0], &[])], vec![], "is larger than can be"),
        (vec![], vec![("a/b", &four[..])], "names the file `a/b`, which is not a plain file name"),
        (vec![], vec![("..", &four[..])], "which is not a plain file name"),
        (vec![], vec![(ADAPTER_CONFIG, &four[..])], "would be written twice"),
        (vec![], vec![("a", &four[..]), ("a", &four[..])], "`a` would be written twice"),
    ] {
        let message = write_adapter(&Disk, &adapter, "{}", &tensors, &files, &[], false).unwrap_err().to_string();
        assert!(message.starts_with(&*adapter.to_string_lossy()) && message.contains(wanted), "{message}");
        assert_eq!(names(folder.path()), Vec::<String>::new());
    }
}

#[test]
fn a_header_needs_no_metadata() {
    let bytes = header(&[("t", Dtype::U8, &[2, 1])], &BTreeMap::new()).unwrap();
    assert_eq!(bytes[..8], 56_u64.to_le_bytes());
    let json = std::str::from_utf8(&bytes[8..]).unwrap();
    assert_eq!(json.trim_end(), r#"{"t":{"dtype":"U8","shape":[2, 1],"data_offsets":[0,2]}}"#);
}

#[cfg(unix)]
#[test]
fn modes_are_those_of_new_files_or_of_the_ones_replaced() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempdir().unwrap();
    let mode = |name: &str| std::fs::metadata(folder.path().join(name)).unwrap().permissions().mode() & 0o7777;
    std::fs::write(folder.path().join("plain"), "").unwrap();
    save(folder.path(), 1, false).unwrap();
    for name in [ADAPTER_CONFIG, ADAPTER_WEIGHTS, "README.md"] {
        assert_eq!(mode(name), mode("plain"), "{name}");
        std::fs::set_permissions(folder.path().join(name), std::fs::Permissions::from_mode(0o640)).unwrap();
    }
    save(folder.path(), 2, false).unwrap();
    for name in [ADAPTER_CONFIG, ADAPTER_WEIGHTS, "README.md"] {
        assert_eq!(mode(name), 0o640, "{name}");
    }
}

#[cfg(unix)]
#[test]
fn links_are_replaced_and_what_they_led_to_stays() {
    let folder = tempdir().unwrap();
    let (adapter, blob) = (folder.path().join("adapter"), folder.path().join("blob"));
    std::fs::create_dir(&adapter).unwrap();
    std::fs::write(&blob, "as it was").unwrap();
    for name in [ADAPTER_CONFIG, ADAPTER_WEIGHTS] {
        std::os::unix::fs::symlink(&blob, adapter.join(name)).unwrap();
    }
    save(&adapter, 1, false).unwrap();
    assert_version(&adapter, 1);
    assert_eq!(std::fs::read_to_string(&blob).unwrap(), "as it was");
}

#[test]
fn a_reader_beside_the_writer_sees_one_version_or_the_other() {
    let folder = tempdir().unwrap();
    let path = folder.path();
    save(path, 1, false).unwrap();
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| (0..100).try_for_each(|at| save(path, 1 + at % 2, false)));
        while !writer.is_finished() {
            match weights(path) {
                Ok(version) => assert!([1, 2].contains(&version)),
                // Between the two renames the pair is a mixture, and known as one.
                Err(error) => assert!(error.to_string().contains("cut short"), "{error}"),
            }
        }
        writer.join().unwrap().unwrap();
    });
    assert_version(path, 2);
}
