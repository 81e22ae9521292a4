//! Merging, into a folder that is not there yet and over an earlier merge.

use std::collections::BTreeMap;
use std::path::Path;

use peftrs_core::checkpoint::Links;
use peftrs_core::dtype::Dtype;
use peftrs_core::error::Result;
use peftrs_core::merge::{Merge, Settings, Watch, Writing, Written};
use peftrs_core::plan::Options;
use peftrs_core::writer::{Disk, FolderWriter, Storage, Tensor, header, write_adapter};

use crate::fake::{Fake, Fault, Random, Tree};
use crate::{ERRORS, SEEDS};

const OUT: &str = "/fake/new/out";

/// A watcher who looks away.
struct NoOne;

impl Watch for NoOne {
    fn advance(&self, _: u64) {}

    fn interrupted(&self) -> Option<i32> {
        None
    }
}

/// A model of two shards, of which an adapter of rank 1 changes one tensor each.
fn inputs() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base");
    std::fs::create_dir_all(base.join("1_Pooling")).unwrap();
    let shape = [4, 6];
    let mut map = Vec::new();
    let (mut tensors, data) = (Vec::new(), [1_u8; 96]);
    for index in [1, 2] {
        let names = [format!("l{index}.q.weight"), format!("l{index}.norm.weight")];
        let described: Vec<(&str, Dtype, &[usize])> =
            names.iter().map(|name| (name.as_str(), Dtype::BF16, &shape[..])).collect();
        let mut bytes = header(&described, &BTreeMap::new()).unwrap();
        bytes.extend((0..96).map(|at| at * index));
        let file = format!("model-{index}.safetensors");
        std::fs::write(base.join(&file), bytes).unwrap();
        map.extend(names.iter().map(|name| format!("\"{name}\": \"{file}\"")));
        for (slot, shape) in [("A", &[1_usize, 6][..]), ("B", &[4, 1])] {
            tensors.push((format!("base_model.model.l{index}.q.lora_{slot}.weight"), shape));
        }
    }
    let index = format!("{{\"weight_map\": {{{}}}}}", map.join(", "));
    for (name, text) in [("model.safetensors.index.json", index.as_str()), ("config.json", "{}"), ("1_Pooling/a", "a")]
    {
        std::fs::write(base.join(name), text).unwrap();
    }
    let tensors: Vec<Tensor<'_>> = tensors
        .iter()
        .map(|(name, shape)| Tensor {
            name,
            dtype: Dtype::BF16,
            shape,
            data: &data[..shape.iter().product::<usize>() * 2],
        })
        .collect();
    let config = r#"{"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["q"], "bias": "none"}"#;
    write_adapter(&Disk, &folder.path().join("adapter"), config, &tensors, &[], &[], false).unwrap();
    folder
}

/// How it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    NoSync,
    Sync,
    Resume,
    Check,
}

/// A merge ready to be written, and what there is to be written over.
struct Case {
    merge: Merge,
    /// No earlier output, and one.
    starts: [Fake; 2],
    old: Tree,
    new: Tree,
    _inputs: tempfile::TempDir,
}

impl Case {
    fn new() -> Self {
        let inputs = inputs();
        let settings = Settings { links: Links::Confined, options: Options::default(), apply: None };
        let merge =
            Merge::open(&inputs.path().join("base"), &[(inputs.path().join("adapter"), 1.0)], settings).unwrap();
        let empty = Fake::new(0);
        empty.create_folder(Path::new("/fake/stranger")).unwrap();
        let old = empty.with(Fault::None, 0);
        let writer = FolderWriter::create(&old, Path::new(OUT), false).unwrap();
        for name in ["model-1.safetensors", "model-3.safetensors", "deep/config.json"] {
            writer.write(name, b"old").unwrap();
        }
        writer.finish(true).unwrap();
        let mut case = Self { merge, old: old.tree(OUT), new: Tree::new(), starts: [empty, old], _inputs: inputs };
        let whole = case.starts[0].with(Fault::None, 0);
        case.write(&whole, How::Sync).unwrap();
        case.new = whole.tree(OUT);
        assert_eq!(case.new.len(), 8, "{:?}", case.new.keys());
        case
    }

    fn write(&self, storage: &dyn Storage, how: How) -> Result<Written> {
        // A note for each tensor.
        let resume = (how == How::Resume).then_some(64);
        let writing = Writing {
            overwrite: true,
            sync: how != How::NoSync,
            resume,
            check: how == How::Check,
            keep_restore: how == How::Check,
        };
        self.merge.write(storage, Path::new(OUT), writing, &NoOne)
    }

    /// Whether the output is the new one; panics unless it is that or as before.
    fn is_new(&self, fake: &Fake, old: bool, context: &str) -> bool {
        let tree = fake.tree(OUT);
        let before = if old { tree == self.old } else { tree.is_empty() };
        assert!(before || tree == self.new, "{context}: {:?}", tree.keys());
        assert!(fake.tree("/fake").contains_key("stranger"), "{context}");
        !before
    }
}

/// One thread, so that the calls come in the same order each time.
fn alone(test: impl FnOnce() + Send) {
    rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap().install(test);
}

#[test]
fn after_a_kill_or_a_loss_of_power_the_output_is_as_before_or_whole() {
    alone(|| {
        let case = Case::new();
        let (mut lost, mut resumed) = (0, 0);
        for seed in 0..SEEDS {
            let mut random = Random::new(seed);
            let old = random.below(2) == 1;
            let power = random.below(4) > 0;
            let how = [How::Sync, How::Resume, if power { How::Sync } else { How::NoSync }][random.below(3)];
            let mut found = case.starts[usize::from(old)].with(Fault::None, seed);
            // A merge that is gone on with may be cut short again.
            for _ in 0..=random.below(if how == How::Resume { 3 } else { 1 }) {
                // Short writes make some more calls in one run than in another.
                let fake = found.with(Fault::End(1 + random.below(150)), random.next());
                let written = case.write(&fake, how).is_ok();
                found = if power { fake.after_power_loss(random.next()) } else { fake.with(Fault::None, seed) };
                let new = case.is_new(&found, old, &format!("seed {seed}"));
                assert!(!written || new, "seed {seed}: a merge that had returned is lost");
                lost += usize::from(!new);
            }
            let written = case.write(&found, if how == How::Resume { how } else { How::Sync }).unwrap();
            resumed += usize::from(written.resumed > 0);
            assert!(case.is_new(&found, old, "the merge after it"), "seed {seed}");
            assert_eq!(fake_names(&found, "resume"), Vec::<String>::new(), "seed {seed}");
        }
        assert!(lost > 3000 && resumed > 500, "{lost} were cut short, {resumed} gone on with");
    });
}

/// The temporary names that are left, with that end.
fn fake_names(fake: &Fake, end: &str) -> Vec<String> {
    fake.tree("/fake").into_keys().filter(|path| path.contains(".tmp-") && path.ends_with(end)).collect()
}

#[test]
fn whichever_call_fails_the_output_is_as_before_and_nothing_else_is_left() {
    alone(|| {
        let case = Case::new();
        let mut struck = 0;
        for (old, how) in [(false, How::Sync), (true, How::Sync), (false, How::Resume), (true, How::Resume)] {
            for (number, lasting) in ERRORS.into_iter().flat_map(|number| [(number, false), (number, true)]) {
                for at in 1.. {
                    let fault = if lasting { Fault::From(at, number) } else { Fault::Once(at, number) };
                    let fake = case.starts[usize::from(old)].with(fault, 1);
                    let written = case.write(&fake, how);
                    let Some(call) = fake.struck() else {
                        assert!(written.is_ok());
                        break;
                    };
                    struck += 1;
                    let context = format!("{how:?}, call {at}, {call:?}, error {number}, {written:?}");
                    let new = case.is_new(&fake, old, &context);
                    match written {
                        // The new output stays where the way back fails too; then the old one is beside it, and told.
                        Err(error) if new => {
                            let told = ["cannot sync: ", "cannot remove: "].map(|end| error.to_string().contains(end));
                            assert!(told[0] && lasting || told[1] && old, "{context}");
                        }
                        Err(_) if how == How::Resume => {}
                        _ => {
                            assert_eq!(fake_names(&fake, ""), Vec::<String>::new(), "{context}");
                            assert!(new || old || !fake.tree("/fake").contains_key("new"), "{context}");
                        }
                    }
                    let fake = fake.with(Fault::None, 1);
                    case.write(&fake, how).unwrap();
                    assert!(case.is_new(&fake, old, "the merge after it"));
                    assert_eq!(fake_names(&fake, "resume"), Vec::<String>::new(), "{context}");
                }
            }
        }
        assert!(struck > 600, "{struck} calls failed");
    });
}

#[test]
fn a_check_finds_what_is_not_as_it_was_made() {
    alone(|| {
        let case = Case::new();
        let whole = case.starts[0].with(Fault::None, 1);
        let checked = case.write(&whole, How::Check).unwrap().checked.unwrap();
        assert_eq!((checked.rows, checked.values, checked.copied), (8, 48, 4));
        let mut found = 0;
        for at in 1..=whole.calls() {
            let fake = case.starts[0].with(Fault::Flip(at), 1);
            match case.write(&fake, How::Check) {
                Ok(_) => {
                    let tensors =
                        |tree: &Tree| tree.clone().into_iter().filter(|(name, _)| name.ends_with(".safetensors"));
                    let differ: Vec<_> =
                        tensors(&fake.tree(OUT)).zip(tensors(&whole.tree(OUT))).filter(|(a, b)| a != b).collect();
                    assert!(differ.is_empty(), "call {at}: {differ:?}");
                }
                Err(error) => {
                    assert!(error.to_string().contains(": the bytes written "), "{error}");
                    assert_eq!(fake_names(&fake, ""), Vec::<String>::new());
                    found += 1;
                }
            }
        }
        assert!(found >= 6, "{found}");
    });
}
