//! Saving an adapter, anew and in the place of another.

use std::path::Path;

use peftrs_core::checkpoint::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoint, Links};
use peftrs_core::dtype::Dtype;
use peftrs_core::error::Result;
use peftrs_core::writer::{Storage, Tensor, write_adapter};

use crate::fake::{Call, Fake, Fault, Random, Tree};
use crate::{ERRORS, SEEDS};

const FOLDER: &str = "/fake/new/adapter";

fn config(version: u8) -> String {
    format!("{{\"version\": {version}}}")
}

fn save(storage: &dyn Storage, version: u8, sync: bool) -> Result<()> {
    let data = vec![version; 96];
    let tensor = Tensor { name: "t", dtype: Dtype::BF16, shape: &[48], data: &data };
    write_adapter(storage, Path::new(FOLDER), &config(version), &[tensor], &[("README.md", b"text")], &[], sync)
}

/// A file system without the adapter or with its first version, beside a file of someone else's.
fn start(old: bool) -> Fake {
    let fake = Fake::new(0);
    let root = Path::new("/fake");
    fake.create_file(&root.join("stranger")).unwrap().reserve(3).unwrap();
    if old {
        save(&fake, 1, true).unwrap();
    }
    fake.with(Fault::None, 0)
}

/// The config and the weights of each version, as files.
fn versions() -> [Tree; 2] {
    [1, 2].map(|version| {
        let fake = start(false);
        save(&fake, version, false).unwrap();
        fake.tree(FOLDER)
    })
}

/// The version that is there, if a pair is; panics at one that is neither whole nor known as broken.
fn version(fake: &Fake, versions: &[Tree; 2]) -> Option<usize> {
    let tree = fake.tree(FOLDER);
    let is = |name: &str| versions.iter().position(|version| tree.get(name) == version.get(name));
    for name in [ADAPTER_CONFIG, ADAPTER_WEIGHTS] {
        assert!(!tree.contains_key(name) || is(name).is_some(), "{name} is torn");
    }
    match (is(ADAPTER_CONFIG), is(ADAPTER_WEIGHTS)) {
        (Some(config), Some(weights)) if config == weights => Some(config + 1),
        _ => {
            let folder = tempfile::tempdir().unwrap();
            for (name, bytes) in &tree {
                std::fs::write(folder.path().join(name), bytes.as_ref().unwrap()).unwrap();
            }
            let message = Checkpoint::open_adapter(folder.path(), Links::Confined).unwrap_err().to_string();
            let known = ["was cut short", "holds no adapter_model.safetensors", "cannot open: No such file"];
            assert!(tree.is_empty() || known.iter().any(|known| message.contains(known)), "{message}");
            None
        }
    }
}

fn untouched(fake: &Fake) -> bool {
    fake.tree("/fake").get("stranger") == Some(&Some(vec![0; 3]))
}

#[test]
fn after_a_kill_or_a_loss_of_power_a_save_is_whole_or_known_as_cut_short() {
    let versions = versions();
    let starts = [false, true].map(start);
    for seed in 0..SEEDS {
        let mut random = Random::new(seed);
        let old = random.below(2) == 1;
        let power = random.below(4) > 0;
        let sync = power || random.below(2) == 1;
        let whole = starts[usize::from(old)].with(Fault::None, seed);
        save(&whole, 2, sync).unwrap();
        // One call after the last: the process ends after it returned.
        let at = 1 + random.below(whole.calls() + 1);
        let fake = starts[usize::from(old)].with(Fault::End(at), seed);
        let saved = save(&fake, 2, sync).is_ok();
        let found = if power { fake.after_power_loss(random.next()) } else { fake.with(Fault::None, seed) };
        let version = version(&found, &versions);
        assert!(!saved || version == Some(2), "seed {seed}: a save that had returned is lost");
        assert!(untouched(&found), "seed {seed}");
        save(&found, 2, true).unwrap();
        assert_eq!(self::version(&found, &versions), Some(2), "seed {seed}: the save after it");
    }
}

#[test]
fn whichever_call_fails_a_save_leaves_a_pair_and_nothing_else() {
    let versions = versions();
    let mut struck = 0;
    for (old, number, lasting) in [false, true]
        .into_iter()
        .flat_map(|old| ERRORS.map(|number| [(old, number, false), (old, number, true)]))
        .flatten()
    {
        let before = start(old);
        for at in 1.. {
            let fault = if lasting { Fault::From(at, number) } else { Fault::Once(at, number) };
            let fake = before.with(fault, 1);
            let saved = save(&fake, 2, true);
            let Some(call) = fake.struck() else {
                assert!(saved.is_ok());
                break;
            };
            struck += 1;
            let tree = fake.tree(FOLDER);
            assert!(untouched(&fake));
            if saved.is_ok() {
                // A look that fails may be made up for.
                assert_eq!((call, version(&fake, &versions)), (Call::Look, Some(2)));
            } else if version(&fake, &versions).is_some() {
                assert!(!tree.keys().any(|name| name.contains(".tmp-")), "call {at} left {:?}", tree.keys());
            } else {
                // Between the two renames, the config stays under its temporary name, or nothing was there and is now.
                let left = tree.keys().filter(|name| name.contains(".tmp-")).count();
                assert!(tree.is_empty() || left == 1, "call {at} left {:?}", tree.keys());
                assert!(!tree.is_empty() || !fake.tree("/fake").contains_key("new"), "call {at} left a folder");
            }
            let fake = fake.with(Fault::None, 1);
            save(&fake, 2, true).unwrap();
            assert_eq!(version(&fake, &versions), Some(2));
        }
    }
    assert!(struck > 100, "{struck} calls failed");
}
