//! The tool killed, interrupted, out of room, in a race or with its inputs cut off: what is there afterwards.

#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod common;

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Case, Tensor, write};
use safetensors::tensor::Dtype::{BF16, F32};
use serde_json::{Value, json};

/// Every file below a folder with its bytes.
type Tree = BTreeMap<String, Vec<u8>>;

const SHARDS: u64 = 4;

/// A base of four shards and two adapters for it, `adapter` and `other`.
fn case() -> Case {
    let mut case = Case::new();
    for layer in 0..SHARDS {
        case = case
            .base(&format!("l{layer}.q.weight"), Tensor::new(BF16, &[256, 512], layer))
            .base(&format!("l{layer}.up.weight"), Tensor::new(BF16, &[512, 256], layer + 100))
            .with(&format!("l{layer}.q.lora_A.weight"), Tensor::new(F32, &[2, 512], layer + 200))
            .with(&format!("l{layer}.q.lora_B.weight"), Tensor::new(F32, &[256, 2], layer + 300));
    }
    case.save();
    std::fs::rename(case.path("adapter"), case.path("other")).unwrap();
    case.config["lora_alpha"] = json!(7);
    case.save();
    std::fs::remove_file(case.path("base/model.safetensors")).unwrap();
    let mut map = serde_json::Map::new();
    for layer in 0..SHARDS {
        let file = format!("model-{layer}.safetensors");
        let of_layer = |name: &str| name.starts_with(&format!("l{layer}."));
        let tensors = case.tensors.iter().filter(|(name, _)| of_layer(name));
        let tensors: common::Tensors = tensors.map(|(name, tensor)| (name.clone(), tensor.clone())).collect();
        map.extend(tensors.keys().map(|name| (name.clone(), Value::from(file.as_str()))));
        write(&case.path("base").join(file), &tensors);
    }
    let index = json!({ "weight_map": map }).to_string();
    std::fs::write(case.path("base/model.safetensors.index.json"), index).unwrap();
    case
}

fn tree(folder: &Path) -> Tree {
    let mut tree = Tree::new();
    let Ok(entries) = std::fs::read_dir(folder) else { return tree };
    for entry in entries.map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        if entry.path().is_dir() {
            let below = self::tree(&entry.path());
            tree.extend(below.into_iter().map(|(inside, bytes)| (format!("{name}/{inside}"), bytes)));
        } else {
            tree.insert(name, std::fs::read(entry.path()).unwrap());
        }
    }
    tree
}

/// The names beside the output that are ours.
fn temporary(case: &Case) -> Vec<String> {
    let entries = std::fs::read_dir(case.root.path()).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.contains(".tmp-")).collect()
}

fn start(case: &Case, arguments: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_peftrs-merge"))
        .args(arguments)
        .current_dir(case.root.path())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// What a merge of that adapter writes.
fn merged(case: &Case, adapter: &str) -> Tree {
    assert_eq!(case.run(&["base", adapter, "-o", "whole", "--quiet", "--keep-restore"]).code, 0);
    let tree = tree(&case.path("whole"));
    std::fs::remove_dir_all(case.path("whole")).unwrap();
    tree
}

/// Kills merges at moments spread over their run, and runs each again.
fn kill(moments: u64) {
    let case = case();
    let (old, new) = (merged(&case, "other"), merged(&case, "adapter"));
    let inputs = || ["base", "adapter", "other"].map(|folder| tree(&case.path(folder)));
    let before = inputs();
    let ways = [&["--no-sync", "--keep-restore"][..], &["--keep-restore"], &["--resume", "--keep-restore"]];
    let spans = ways.map(|way| {
        let started = Instant::now();
        assert_eq!(case.run(&[&["base", "adapter", "-o", "out", "--overwrite"], way].concat()).code, 0);
        started.elapsed()
    });
    let (mut killed, mut resumed) = (0, 0);
    for moment in 0..moments {
        let way = usize::try_from(moment % 3).unwrap();
        let arguments = [&["base", "adapter", "-o", "out", "--overwrite"], ways[way]].concat();
        let there = moment / 3 % 2 == 0;
        if there {
            assert_eq!(case.run(&["base", "other", "-o", "out", "--overwrite", "--quiet", "--keep-restore"]).code, 0);
        } else {
            let _ = std::fs::remove_dir_all(case.path("out"));
        }
        let mut merge = start(&case, &arguments);
        // The golden ratio spreads any number of moments evenly over the run and a little beyond it.
        let share = (f64::from(u32::try_from(moment).unwrap()) * 0.618_033_988_75).fract() * 1.1;
        std::thread::sleep(spans[way].mul_f64(share));
        merge.kill().unwrap();
        killed += u64::from(merge.wait().unwrap().signal().is_some());
        let found = tree(&case.path("out"));
        assert!(found == new || if there { found == old } else { found.is_empty() }, "moment {moment}");
        assert!(inputs() == before, "moment {moment}");
        let again = case.run(&arguments);
        assert_eq!(again.code, 0, "moment {moment}: {}", again.stderr);
        resumed += u64::from(again.stderr.contains("from an earlier run"));
        assert!(tree(&case.path("out")) == new, "moment {moment}");
        for name in temporary(&case) {
            assert!(!name.ends_with("resume"), "moment {moment}");
            std::fs::remove_dir_all(case.path(&name)).unwrap();
        }
    }
    assert!(killed > moments / 5 && resumed > 0, "{killed} of {moments} were killed, {resumed} gone on with");
}

#[test]
fn a_killed_merge_leaves_what_was_there() {
    kill(30);
}

#[test]
#[ignore = "takes a minute"]
fn a_merge_killed_at_200_moments_leaves_what_was_there() {
    kill(200);
}

/// Makes the base a gigabyte larger without taking room, and starts a merge that has begun to write when this returns.
fn begun(case: &Case, arguments: &[&str]) -> Child {
    use std::io::Write;
    let bytes = 1_u64 << 30;
    let header = format!(r#"{{"big":{{"dtype":"U8","shape":[{bytes}],"data_offsets":[0,{bytes}]}}}}"#);
    let mut file = std::fs::File::create(case.path("base/model-9.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(8 + header.len() as u64 + bytes).unwrap();
    let path = case.path("base/model.safetensors.index.json");
    let mut index: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    index["weight_map"]["big"] = json!("model-9.safetensors");
    std::fs::write(&path, index.to_string()).unwrap();
    let merge = start(case, arguments);
    let started = |name: &String| case.path(name).join("model-9.safetensors").exists();
    while !temporary(case).iter().any(started) {
        std::thread::sleep(Duration::from_millis(1));
    }
    merge
}

fn stderr(merge: &mut Child) -> String {
    let mut text = String::new();
    std::io::Read::read_to_string(merge.stderr.as_mut().unwrap(), &mut text).unwrap();
    text
}

#[test]
fn a_signal_ends_a_merge_within_a_second() {
    let case = case();
    let expected = merged(&case, "adapter");
    for (signal, code, resume) in [("INT", 130, false), ("TERM", 143, false), ("TERM", 143, true)] {
        let mut arguments = vec!["base", "adapter", "-o", "out", "--threads", "1"];
        arguments.extend(resume.then_some("--resume"));
        let mut merge = begun(&case, &arguments);
        let sent = Instant::now();
        assert!(Command::new("kill").args(["-s", signal, &merge.id().to_string()]).status().unwrap().success());
        let status = merge.wait().unwrap();
        assert!(sent.elapsed() < Duration::from_secs(1), "{:?}", sent.elapsed());
        assert_eq!((status.code(), status.signal()), (Some(code), None));
        let said = stderr(&mut merge);
        assert!(!case.path("out").exists());
        if resume {
            assert_eq!(said, "error: interrupted\nhint: the same command goes on where it stopped\n");
            assert_eq!(temporary(&case), ["out.tmp-resume"]);
        } else {
            assert_eq!(said, "error: interrupted, nothing was written\n");
            assert_eq!(temporary(&case), Vec::<String>::new());
        }
    }
    let kept = || std::fs::read_to_string(case.path("out.tmp-resume/peftrs-resume.txt")).unwrap().lines().count();
    assert_eq!(kept(), 1 + usize::try_from(SHARDS).unwrap());
    std::fs::remove_file(case.path("out.tmp-resume/model-9.safetensors")).unwrap();
    // Another merge into the same output starts anew; so does the same with other inputs.
    let mut merge = begun(&case, &["base", "other", "-o", "out", "--resume"]);
    merge.kill().unwrap();
    merge.wait().unwrap();
    let other = std::fs::read(case.path("out.tmp-resume/model-0.safetensors")).unwrap();
    assert!(other != expected["model-0.safetensors"] && kept() == 1 + usize::try_from(SHARDS).unwrap());
    // The big tensor has served, the rest is as it was.
    let index = std::fs::read_to_string(case.path("base/model.safetensors.index.json")).unwrap();
    std::fs::write(
        case.path("base/model.safetensors.index.json"),
        index.replace(r#","big":"model-9.safetensors""#, ""),
    )
    .unwrap();
    std::fs::remove_file(case.path("base/model-9.safetensors")).unwrap();
    let done = case.run(&["base", "adapter", "-o", "out", "--resume"]);
    assert_eq!((done.code, done.stderr.contains("from an earlier run")), (0, false), "{}", done.stderr);
    for name in (0..SHARDS).map(|shard| format!("model-{shard}.safetensors")) {
        assert!(tree(&case.path("out"))[&name] == expected[&name], "{name}");
    }
    assert_eq!(temporary(&case), Vec::<String>::new());
}

#[test]
fn a_second_merge_that_resumes_into_the_same_output_is_refused() {
    let case = case();
    let mut first = begun(&case, &["base", "adapter", "-o", "out", "--resume", "--threads", "1"]);
    let second = case.run(&["base", "adapter", "-o", "out", "--resume"]);
    first.kill().unwrap();
    first.wait().unwrap();
    assert_eq!(second.code, 1);
    assert!(second.stderr.contains("out.tmp-resume is in use\nhint: another merge is writing"), "{}", second.stderr);
    assert_eq!(temporary(&case), ["out.tmp-resume"]);
}

#[test]
fn a_shard_that_is_cut_off_while_it_is_read_is_told() {
    let case = case();
    let mut merge = begun(&case, &["base", "adapter", "-o", "out"]);
    let shard = std::fs::File::options().write(true).open(case.path("base/model-9.safetensors")).unwrap();
    shard.set_len(1000).unwrap();
    assert_eq!(merge.wait().unwrap().code(), Some(1));
    let said = stderr(&mut merge);
    assert!(
        said.starts_with("error: base/model-9.safetensors: was c") && said.contains(" while it was read\nhint: "),
        "{said}"
    );
    assert!(!case.path("out").exists());
    assert_eq!(temporary(&case), Vec::<String>::new());
}

#[test]
fn a_full_disk_leaves_nothing() {
    let case = case();
    let before = tree(&case.path("base"));
    // No file may be longer than that many blocks: the second shard's room is refused.
    let script = "ulimit -f 100; trap '' XFSZ; exec \"$0\" base adapter -o out";
    let output = Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_peftrs-merge")])
        .current_dir(case.root.path())
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.starts_with("error: out/model-0.safetensors: cannot write: "), "{said}");
    assert!(!case.path("out").exists() && tree(&case.path("base")) == before);
    assert_eq!(temporary(&case), Vec::<String>::new());
    assert_eq!(case.run(&["base", "adapter", "-o", "out"]).code, 0);
}

#[test]
fn of_two_merges_into_one_output_one_wins() {
    let case = case();
    let trees = ["other", "adapter"].map(|adapter| merged(&case, adapter));
    for round in 0..6 {
        let overwrite: &[&str] = if round % 2 == 0 { &["--overwrite", "--keep-restore"] } else { &["--keep-restore"] };
        let _ = std::fs::remove_dir_all(case.path("out"));
        let merges =
            ["other", "adapter"].map(|adapter| start(&case, &[&["base", adapter, "-o", "out"], overwrite].concat()));
        let ended = merges.map(|mut merge| (merge.wait().unwrap().code(), stderr(&mut merge)));
        let won = ended.iter().filter(|(code, _)| *code == Some(0)).count();
        assert!(won > 0, "{ended:?}");
        for (code, said) in &ended {
            let refused = ["exists and is not empty", "cannot rename: "].iter().any(|reason| said.contains(reason));
            assert!(*code == Some(0) || *code == Some(1) && refused, "{said}");
        }
        assert!(trees.contains(&tree(&case.path("out"))), "round {round}");
        assert_eq!(temporary(&case), Vec::<String>::new());
    }
}

#[test]
fn an_output_that_leads_to_an_input_is_refused() {
    let case = case();
    let before = tree(&case.path("base"));
    for (name, target) in [("link", "base"), ("to_adapter", "adapter"), ("file", "base/model-0.safetensors")] {
        std::os::unix::fs::symlink(target, case.path(name)).unwrap();
        let output = case.run(&["base", "adapter", "-o", name, "--overwrite"]);
        assert_eq!(output.code, 1, "{}", output.stderr);
    }
    assert!(tree(&case.path("base")) == before);
    assert_eq!(temporary(&case), Vec::<String>::new());
}
