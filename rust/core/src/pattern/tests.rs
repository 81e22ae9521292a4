#![allow(clippy::unwrap_used, reason = "a test may panic")]

use proptest::prelude::*;

use super::*;

fn is_match(pattern: &str, role: Role, name: &str) -> bool {
    let budget = Budget::default();
    Pattern::new("field", pattern, role, &budget).unwrap().is_match(Name::new(name), &budget).unwrap()
}

fn refusal(pattern: &str, role: Role) -> String {
    Pattern::new("target_modules", pattern, role, &Budget::default()).unwrap_err().to_string()
}

#[test]
fn each_role_matches_as_peft_wraps_it() {
    assert!(is_match("q|model.q_proj", Role::Whole, "model.q_proj"));
    assert!(!is_match("q_proj", Role::Whole, "model.q_proj"));
    assert!(is_match("q_proj", Role::Suffix, "model.q_proj"));
    assert!(!is_match("q_proj", Role::Suffix, "model.my_q_proj"));
    assert!(is_match("layers.1", Role::Suffix, "model.layersx1"), "a dot is any character");
    assert!(!is_match(r"layers\.1", Role::Suffix, "model.layersx1"));
    assert!(!is_match("^q_proj", Role::Suffix, "model.q_proj"));
    assert!(is_match(r"(q)\3_proj", Role::Suffix, "model.qq_proj"), "the key's first group is the third");
    assert!(is_match("head", Role::Subtree, "head.dense"));
    assert!(is_match("a.head", Role::Subtree, "x.a.head.dense"));
    assert!(!is_match("head", Role::Subtree, "myhead.dense"));
}

#[test]
fn constructs_without_a_linear_form_match() {
    for (pattern, name, expected) in [
        (r"(?!.*lm_head).*proj", "model.q_proj", true),
        (r"(?!.*lm_head).*proj", "lm_head.q_proj", false),
        (r".*(?<=layers\.1)\.q", "model.layers.1.q", true),
        (r"(a|b)\.\1", "a.a", true),
        (r"(a|b)\.\1", "a.b", false),
        (r"(?P<x>a)?b(?(x)c|d)", "abc", true),
        (r"(?P<x>a)?b(?(x)c|d)", "bc", false),
        (r"a*+a", "aaa", false),
        (r"(?>a*)b", "aab", true),
        (r"(?=(a))*\1", "a", true),
        (r"(?=(a))*?b", "b", true),
        (r"(?=(a)){0}b|\1", "a", false),
        (r"(?=a){2}(?<!b)+a", "a", true),
        (r"\w+", "é", true),
        (r"(?a)\w+", "é", false),
    ] {
        assert_eq!(is_match(pattern, Role::Whole, name), expected, "{pattern} on {name}");
    }
}

#[test]
fn a_dollar_comes_before_a_newline_that_ends_the_name() {
    assert!(is_match("q", Role::Suffix, "q\n"));
    assert!(!is_match(r"q\Z", Role::Suffix, "q\n"));
    assert!(!is_match("q", Role::Whole, "q\n"));
    assert!(is_match("q$\n", Role::Whole, "q\n"));
}

#[test]
fn the_number_of_a_layer_is_the_first() {
    let budget = Budget::default();
    let pattern = Pattern::new("layers_pattern", "layers", Role::Layers, &budget).unwrap();
    for (name, expected) in
        [("model.layers.12.mlp.experts.3.w", Some("12")), ("layers.0.q", Some("0")), ("model.layers.q", None)]
    {
        assert_eq!(pattern.layer(Name::new(name), &budget).unwrap(), expected, "{name}");
    }
    let alternatives = Pattern::new("layers_pattern", "a|b", Role::Layers, &budget).unwrap();
    assert_eq!(alternatives.layer(Name::new("a.x"), &budget).unwrap(), Some(""));
}

#[test]
fn refusals_name_the_field_the_pattern_and_the_construct() {
    for (pattern, reason) in [
        ("(", "is malformed: missing ), unterminated subpattern"),
        ("a)", "is malformed: unbalanced parenthesis"),
        ("*a", "is malformed: nothing to repeat"),
        ("a**", "is malformed: multiple repeat"),
        ("a{3,2}", "is malformed: min repeat greater than max repeat"),
        ("a{99999999999}", "is malformed: repetition is too large"),
        ("[a", "is malformed: unterminated character set"),
        ("[z-a]", "is malformed: bad character range"),
        (r"\q", r"is malformed: bad escape \q"),
        (r"\1", "is malformed: invalid group reference 1"),
        (r"(\1)", "is malformed: cannot refer to an open group"),
        ("(?<=a*)b", "is malformed: look-behind requires fixed-width pattern"),
        ("a(?i)", "is malformed: global flags not at the start of the expression"),
        ("(?P<a>.)(?P<a>.)", "is malformed: redefinition of group name 'a'"),
        ("(?(1)a|b|c)", "is malformed: conditional backref with more than two branches"),
        (r"\N{DIGIT ONE}", r"has what is not supported: a character by its name, \N{...}; write the character itself"),
        (
            "(?i)é",
            "has what is not supported: a letter outside of ASCII whose case is ignored; write both of its cases",
        ),
        ("((((a{100}){100}){100}){100})", "is too large once its repetitions are written out"),
    ] {
        let message = refusal(pattern, Role::Whole);
        assert_eq!(message, format!("target_modules: pattern `{pattern}` {reason}"));
    }
    assert!(refusal(&"(".repeat(5000), Role::Whole).contains("nested more than a hundred deep"));
    assert!(refusal("(?i)q", Role::Suffix).contains("global flags not at the start"));
}

#[test]
fn what_backtracks_without_end_is_refused_soon() {
    let start = Instant::now();
    let budget = Budget::default();
    let pattern = Pattern::new("target_modules", r"(?=(?:(?:a|a)+)+$)x|(?:(a|aa)\1?)+b", Role::Whole, &budget).unwrap();
    let name = "a".repeat(60);
    let message = pattern.is_match(Name::new(&name), &budget).unwrap_err().to_string();
    assert!(message.contains("needs more than 50000 steps"), "{message}");
    assert!(start.elapsed() < Duration::from_secs(1));
}

#[test]
fn a_selection_has_one_budget_of_time() {
    let budget = Budget::default();
    budget.spend(|| std::thread::sleep(MAX_TIME)).unwrap();
    let message = Pattern::new("target_modules", "a+", Role::Whole, &budget).unwrap_err().to_string();
    assert!(message.contains("takes too long"), "{message}");
}

/// Texts of few letters, so that patterns and names meet often.
fn soup() -> impl Strategy<Value = String> {
    r"[ab01._()\[\]{}*+?|^$\\dwsbBAZ:=!<>iP,#-]{0,12}"
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn any_text_is_read_or_refused(text in prop_oneof![soup(), any::<String>()]) {
        let budget = Budget::default();
        for role in [Role::Whole, Role::Suffix, Role::Subtree, Role::Layers] {
            if let Ok(pattern) = Pattern::new("field", &text, role, &budget) {
                let _ = pattern.is_match(Name::new("a.b0_.ab"), &budget);
            }
        }
    }

    /// The three ways to match agree wherever each can.
    #[test]
    fn the_engines_agree(text in soup(), name in "[ab01._-]{1,8}") {
        for role in [Role::Whole, Role::Suffix, Role::Subtree] {
            let budget = Budget::default();
            let Ok(pattern) = Pattern::new("field", &text, role, &budget) else { continue };
            let Ok(found) = pattern.is_match(Name::new(&name), &budget) else { continue };
            let engine = pattern.engine(&budget).unwrap();
            if let Ok(full) = pattern.full(engine, &budget).unwrap().is_match(&name) {
                prop_assert_eq!(found, full, "{:?} {:?}", role, &text);
            }
        }
    }
}

fn texts(pattern: &str) -> Vec<String> {
    let mut texts = parse::parse(pattern).map_err(|_| ()).unwrap().node.texts();
    texts.sort_unstable();
    texts
}

#[test]
fn texts_that_a_name_needs_are_found() {
    for (pattern, expected) in [
        (
            r"model\.layers\.(3|1003)\.mlp\.(up|down)_proj",
            &[
                "model.layers.1003.mlp.down_proj",
                "model.layers.1003.mlp.up_proj",
                "model.layers.3.mlp.down_proj",
                "model.layers.3.mlp.up_proj",
            ] as &[&str],
        ),
        (r".*layers\.7\..*self_attn\.q_proj", &["layers.7."]),
        (r".*[qv]_proj", &["q_proj", "v_proj"]),
        (r"(?i)q", &["Q", "q"]),
        (r"x?(?!lm)head", &["head", "xhead"]),
        (r"layers\.\d+\.(?:attn|.*)\.out", &["layers."]),
        (
            r"[abcdefghij][abcdefghij]end",
            &["aend", "bend", "cend", "dend", "eend", "fend", "gend", "hend", "iend", "jend"],
        ),
        (r"a|b.*", &[]),
        (r"[^a]\w.?", &[]),
        ("é", &[]),
    ] {
        assert_eq!(texts(pattern), expected, "{pattern}");
    }
    assert!(texts(&"a".repeat(1000)).iter().all(|text| text.len() <= 65));
}

#[test]
fn many_keys_match_as_each_does_alone() {
    let forms: [fn(usize) -> String; 8] = [
        |layer| format!(r"model\.layers\.{layer}\.attn\.(q|k)_proj"),
        |layer| format!(r".*layers\.{layer}\..*proj"),
        |layer| format!(r"layers.{layer}.mlp.up"),
        |layer| format!(r"(?:{layer}|1{layer})\.[a-z_.]+"),
        |layer| format!(r"(?!.*mlp).*\.{layer}\.\w+\.q_proj"),
        |layer| format!(r"^model.layers.{layer}"),
        |_| r".*".to_owned(),
        |layer| format!(r"(\w+)\.{layer}\.é?.*"),
    ];
    let keys: Vec<String> = forms.iter().flat_map(|form| (0..4).map(form)).collect();
    let names = (0..14).flat_map(|layer| {
        ["attn.q_proj", "attn.k_proj", "mlp.up", "", "é"].map(|end| format!("model.layers.{layer}.{end}"))
    });
    let budget = Budget::default();
    let together = Keys::new("rank_pattern", keys.iter().map(String::as_str), Role::Suffix, &budget).unwrap();
    for name in names.chain(["layers.1.mlp.up".to_owned(), "model.layers.1\n".to_owned()]) {
        let alone = keys.iter().enumerate().filter(|(_, key)| is_match(key, Role::Suffix, &name));
        let alone: Vec<usize> = alone.map(|(index, _)| index).collect();
        assert_eq!(together.matches(&name, &budget).unwrap(), alone, "{name:?}");
        assert_eq!(together.first(&name, &budget).unwrap(), alone.first().copied());
    }
}
