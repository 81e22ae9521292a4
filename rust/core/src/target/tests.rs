#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may panic")]

use std::time::Instant;

use proptest::prelude::*;

use super::*;

fn strings(names: &[&str]) -> Vec<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}

fn list(names: &[&str]) -> Names {
    Names::List(strings(names))
}

fn model() -> Vec<String> {
    let mut names = strings(&["", "model", "model.embed", "model.layers", "head", "myhead", "head.dense"]);
    for layer in 0..3 {
        names.push(format!("model.layers.{layer}"));
        for leaf in ["attn.q_proj", "attn.v_proj", "mlp.up_proj", "mlp.experts.0.w1"] {
            names.push(format!("model.layers.{layer}.{leaf}"));
        }
    }
    names
}

/// The targets among the modules of [`model`].
fn targets(request: Request) -> Vec<String> {
    select(&Request { modules: &model(), ..request }).unwrap().targets
}

#[test]
fn a_list_matches_names_and_their_ends_after_a_dot() {
    assert_eq!(targets(Request::default()), [""; 0]);
    let names = list(&["q_proj", "head", "proj", "layers.1.mlp.up_proj"]);
    let modules = model();
    let request = Request { modules: &modules, target_modules: Some(&names), ..Request::default() };
    let selection = select(&request).unwrap();
    let expected = [
        "head",
        "model.layers.0.attn.q_proj",
        "model.layers.1.attn.q_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.2.attn.q_proj",
    ];
    assert_eq!(selection.targets, expected);
    let rows: Vec<_> =
        selection.report.iter().map(|row| (row.entry.as_str(), row.count, row.nearest.as_deref())).collect();
    assert_eq!(
        rows,
        [("q_proj", 3, None), ("head", 1, None), ("proj", 0, Some("v_proj")), ("layers.1.mlp.up_proj", 1, None)]
    );
}

#[test]
fn a_string_matches_whole_names_and_hints_at_them() {
    let pattern = Names::Pattern(r".*\.[qv]_proj".into());
    assert_eq!(targets(Request { target_modules: Some(&pattern), ..Request::default() }).len(), 6);
    let modules = model();
    let names = Names::Pattern("q_proj".into());
    let request = Request { modules: &modules, target_modules: Some(&names), ..Request::default() };
    let selection = select(&request).unwrap();
    assert!(selection.targets.is_empty());
    assert_eq!(selection.report, [row("target_modules", "q_proj", 0, Some("model.layers.0.attn.q_proj".into()))]);
}

#[test]
fn all_linear_is_the_names_given_and_nothing_that_ends_like_them() {
    let linear = strings(&["head", "model.layers.1.attn.q_proj"]);
    let word = Names::Pattern("All-Linear".into());
    let found = targets(Request { target_modules: Some(&word), linear: &linear, ..Request::default() });
    assert_eq!(found, linear);
}

#[test]
fn exclusion_comes_before_all_and_saved_modules_are_left_alone() {
    let names = list(&["q_proj", "dense", "head"]);
    let excluded = Names::Pattern(r".*layers\.0\..*".into());
    let saved = strings(&["head"]);
    let modules = model();
    let request = Request {
        modules: &modules,
        target_modules: Some(&names),
        exclude_modules: Some(&excluded),
        modules_to_save: &saved,
        ..Request::default()
    };
    let selection = select(&request).unwrap();
    assert_eq!(selection.targets, ["model.layers.1.attn.q_proj", "model.layers.2.attn.q_proj"]);
    assert_eq!(selection.modules_to_save, ["head"], "`myhead` only ends alike");
    assert_eq!(selection.excluded.len(), 4);
    assert_eq!(selection.report[0], row("target_modules", "q_proj", 3, None), "what is excluded was matched");
}

#[test]
fn layers_narrow_what_ends_in_an_entry_but_not_what_is_one() {
    let names = list(&["q_proj", "model.layers.0.attn.q_proj"]);
    let found = targets(Request { target_modules: Some(&names), layers_to_transform: &[2, 9], ..Request::default() });
    assert_eq!(found, ["model.layers.0.attn.q_proj", "model.layers.2.attn.q_proj"]);
    let patterns = strings(&["experts", "layers"]);
    let names = list(&["w1", "q_proj"]);
    let modules = model();
    let request = Request {
        modules: &modules,
        target_modules: Some(&names),
        layers_to_transform: &[0],
        layers_pattern: &patterns,
        ..Request::default()
    };
    let selection = select(&request).unwrap();
    assert_eq!(selection.targets.len(), 4, "all experts numbered 0, and the first layer's q_proj");
    let rows: Vec<_> = selection.report.iter().map(|row| (row.entry.as_str(), row.count)).collect();
    assert_eq!(rows, [("w1", 3), ("q_proj", 3), ("0", 4), ("experts", 3), ("layers", 3)]);
}

#[test]
fn keys_are_looked_up_first_come_first_served_for_targets_then_parameters() {
    let modules = model();
    let names = list(&["q_proj", "up_proj"]);
    let parameters = strings(&["model.layers.0.mlp.experts.weight", "head.weight"]);
    let wanted = strings(&["experts.weight", "experts.wieght"]);
    let keys = strings(&["layers.1.attn.q_proj", "up_proj", "layers.*", "lm_head"]);
    let patterns = [("rank_pattern".to_owned(), keys)];
    let request = Request {
        modules: &modules,
        target_modules: Some(&names),
        parameters: &parameters,
        target_parameters: &wanted,
        patterns: &patterns,
        ..Request::default()
    };
    let selection = select(&request).unwrap();
    assert_eq!(selection.parameters, ["model.layers.0.mlp.experts.weight"]);
    let indices = [Some(2), Some(1), Some(0), Some(1), Some(2), Some(1), Some(2)];
    assert_eq!(selection.pattern_index, [("rank_pattern".to_owned(), indices.to_vec())]);
    let rows: Vec<_> = selection.report.iter().skip(2).map(|row| (row.entry.as_str(), row.count)).collect();
    let expected = [
        ("experts.weight", 1),
        ("experts.wieght", 0),
        ("layers.1.attn.q_proj", 1),
        ("up_proj", 3),
        ("layers.*", 7),
        ("lm_head", 0),
    ];
    assert_eq!(rows, expected);
    assert_eq!(selection.report[3].nearest.as_deref(), Some("experts.weight"));
}

#[test]
fn feedforward_entries_need_no_dot() {
    let modules = model();
    let names = list(&["q_proj", "up_proj"]);
    for feedforward in [list(&["_proj"]), Names::Pattern(".*_proj".into())] {
        let request = Request {
            modules: &modules,
            target_modules: Some(&names),
            feedforward_modules: Some(&feedforward),
            ..Request::default()
        };
        assert_eq!(select(&request).unwrap().feedforward, [true; 6]);
    }
}

#[test]
fn a_faulty_pattern_is_named_with_its_field() {
    let pattern = Names::Pattern("a(".into());
    for field in ["target_modules", "exclude_modules", "feedforward_modules"] {
        let mut request = Request::default();
        match field {
            "target_modules" => request.target_modules = Some(&pattern),
            "exclude_modules" => request.exclude_modules = Some(&pattern),
            _ => request.feedforward_modules = Some(&pattern),
        }
        let message = select(&request).unwrap_err().to_string();
        assert!(message.starts_with(&format!("{field}: pattern `a(`")), "{message}");
    }
}

#[test]
fn short_lists_select_the_same() {
    let targets: Vec<String> = (0..30).map(|layer| format!("model.layers.{layer}.attn.q_proj")).collect();
    let others = strings(&["model.layers.0.mlp.up_proj", "vision.layers.0.attn.k_proj"]);
    assert_eq!(shortest_suffixes(&targets, &others).unwrap(), ["q_proj"]);
    let message = shortest_suffixes(&strings(&["head"]), &strings(&["decoder.head"])).unwrap_err().to_string();
    assert!(message.contains("no entry selects head"), "{message}");
}

fn name() -> impl Strategy<Value = String> {
    prop::collection::vec("[abc]", 1..5).prop_map(|parts| parts.join("."))
}

proptest! {
    #[test]
    fn short_lists_match_all_targets_no_others_and_lose_nothing(names in prop::collection::btree_set(name(), 1..12), cut in 1_usize..12) {
        let names: Vec<String> = names.into_iter().collect();
        let (targets, others) = names.split_at(cut.min(names.len()));
        let matches = |name: &str, suffix: &str| name == suffix || name.ends_with(&format!(".{suffix}"));
        if let Ok(short) = shortest_suffixes(targets, others) {
            let found = |name: &String| short.iter().any(|suffix| matches(name, suffix));
            prop_assert!(targets.iter().all(found) && !others.iter().any(found));
            for index in 0..short.len() {
                let rest = short.iter().enumerate().filter(|(other, _)| *other != index).map(|(_, suffix)| suffix);
                let rest: Vec<&String> = rest.collect();
                prop_assert!(!targets.iter().all(|name| rest.iter().any(|suffix| matches(name, suffix))));
            }
        }
    }

    #[test]
    fn a_list_matches_as_if_each_entry_were_tried(names in prop::collection::vec(name(), 0..12), entries in prop::collection::vec(name(), 0..6)) {
        let wanted = Names::List(entries.clone());
        let request = Request { modules: &names, target_modules: Some(&wanted), ..Request::default() };
        let expected: Vec<String> = names.iter()
            .filter(|name| entries.iter().any(|entry| *name == entry || name.ends_with(&format!(".{entry}"))))
            .cloned().collect();
        prop_assert_eq!(select(&request).unwrap().targets, expected);
    }
}

/// Ten thousand modules and five hundred of everything; in the release profile this takes some fifty milliseconds.
#[test]
fn large_models_and_long_lists_are_quick() {
    let leaves = ["attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.up_proj", "mlp.down_proj", "norm"];
    let modules: Vec<String> =
        (0..10_000).map(|index| format!("model.layers.{}.{}", index / 7, leaves[index % 7])).collect();
    let entry = |index: usize| format!("layers.{}.{}", index, leaves[index % 7]);
    let names = Names::List((0..500).map(entry).chain(["q_proj".into(), "v_proj".into()]).collect());
    let plain = (0..500).map(entry).collect();
    // Compiling an expression is slow where the compiler of expressions is not optimised.
    let expressions = 0..if cfg!(debug_assertions) { 50 } else { 500 };
    let patterns =
        expressions.map(|index| format!(r".*layers\.{}\.(\w+)\.{}", index, &leaves[index % 6][5..])).collect();
    let patterns = [("rank_pattern".to_owned(), plain), ("alpha_pattern".to_owned(), patterns)];
    let request =
        Request { modules: &modules, target_modules: Some(&names), patterns: &patterns, ..Request::default() };
    let start = Instant::now();
    let selection = select(&request).unwrap();
    let elapsed = start.elapsed();
    eprintln!("{} targets in {elapsed:?}", selection.targets.len());
    assert!(selection.targets.len() > 2_800);
    assert!(elapsed.as_millis() < if cfg!(debug_assertions) { 30_000 } else { 1_500 }, "{elapsed:?}");
}
