#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may panic")]

use serde_json::json;

use super::*;

fn parse(value: &Value) -> Result<AdapterConfig> {
    AdapterConfig::parse(&value.to_string(), "adapter_config.json")
}

fn faults(value: &Value) -> String {
    parse(value).unwrap_err().to_string()
}

fn lora(mut more: Value) -> Value {
    more["peft_type"] = "LORA".into();
    more
}

#[test]
fn what_peft_writes_is_read_without_a_word() {
    let text = r#"{"alora_invocation_tokens": null, "alpha_pattern": {"v_proj": 4}, "arrow_config": null,
        "auto_mapping": {"base_model_class": "M", "parent_library": "l"}, "base_model_name_or_path": "org/base",
        "bias": "lora_only", "corda_config": null, "ensure_weight_tying": false, "eva_config": null, "exclude_modules": null,
        "fan_in_fan_out": true, "inference_mode": true, "init_lora_weights": "pissa_niter_4", "kasa_config": null,
        "layer_replication": [[0, 2], [1, 2]], "layers_pattern": "h", "layers_to_transform": 3, "loftq_config": {},
        "lora_alpha": 16, "lora_bias": true, "lora_dropout": 0, "lora_ga_config": null, "megatron_config": null,
        "megatron_core": "megatron.core", "modules_to_save": ["score"], "monteclora_config": null, "peft_type": "LORA",
        "peft_version": "0.21.2", "qalora_group_size": 16, "r": 4, "rank_pattern": {"z": 2, "a": 3}, "revision": null,
        "target_modules": ["v_proj", "q_proj"], "target_parameters": ["w"], "task_type": "CAUSAL_LM",
        "trainable_token_indices": {"embed": [0, 5]}, "use_bdlora": null, "use_dora": true, "use_qalora": false,
        "use_rslora": false, "velora_config": null}"#;
    let config = AdapterConfig::parse(text, "f").unwrap();
    assert_eq!(config.warnings, Vec::<String>::new());
    assert_eq!(config.base_model.as_deref(), Some("org/base"));
    assert_eq!(config.targeting.target_modules, Some(Names::List(vec!["v_proj".into(), "q_proj".into()])));
    assert_eq!(config.targeting.layers_to_transform, Some(vec![3]));
    assert_eq!(config.targeting.layers_pattern, Some(vec!["h".into()]));
    let lora = config.lora().unwrap();
    assert_eq!((lora.r, lora.lora_alpha, lora.use_dora, lora.lora_bias), (4, 16.0, true, true));
    assert_eq!(lora.rank_pattern, [("z".to_owned(), 2), ("a".to_owned(), 3)], "in the order of the file");
    assert_eq!(lora.init_lora_weights, Init::Named("pissa_niter_4".into()));
    assert_eq!(lora.layer_replication, Some(vec![(0, 2), (1, 2)]));
    assert_eq!(lora.token_indices("model.embed"), [0, 5]);
    assert_eq!(lora.token_indices("model.myembed"), [0; 0]);
    assert_eq!(lora.variants, [""; 0]);
}

#[test]
fn missing_fields_have_pefts_defaults() {
    let config = parse(&lora(json!({}))).unwrap();
    let lora = config.lora().unwrap();
    assert_eq!((lora.r, lora.lora_alpha, lora.bias.as_str()), (8, 8.0, "none"));
    assert_eq!(lora.rank_and_scaling("any").unwrap(), (8, 1.0));
    let Method::Oft(oft) = parse(&json!({"peft_type": "OFT"})).unwrap().method else { panic!() };
    assert_eq!((oft.r, oft.oft_block_size, oft.num_cayley_neumann_terms), (0, 32, 5));
    let Method::Ia3(ia3) = parse(&json!({"peft_type": "IA3"})).unwrap().method else { panic!() };
    assert!(ia3.init_ia3_weights && ia3.feedforward_modules.is_none());
}

#[test]
fn every_wrong_type_is_a_fault() {
    for (field, value, message) in [
        ("r", json!(true), "`r` is true, not an integer from 1 to 65536"),
        ("r", json!(8.0), "`r` is 8.0, not an integer from 1 to 65536"),
        ("r", json!("8"), "`r` is \"8\", not an integer from 1 to 65536"),
        ("r", json!(0), "`r` is 0, not an integer from 1 to 65536"),
        ("r", json!(65_537), "`r` is 65537, not an integer from 1 to 65536"),
        ("r", json!(null), "`r` is null, not an integer from 1 to 65536"),
        ("r", json!(u64::MAX), "`r` is 18446744073709551615, not an integer from 1 to 65536"),
        ("lora_alpha", json!(false), "`lora_alpha` is false, not a finite number"),
        ("lora_dropout", json!(1.5), "`lora_dropout` is 1.5, not a number from 0 to 1"),
        ("use_dora", json!(1), "`use_dora` is 1, not true or false"),
        ("bias", json!("some"), "`bias` is \"some\", not one of none, all, lora_only"),
        ("target_modules", json!(["a", 1]), "`target_modules` is a list of 2, not a string or a list of strings"),
        ("modules_to_save", json!("head"), "`modules_to_save` is \"head\", not a list of at most 100000 strings"),
        ("rank_pattern", json!({"q": 1.0}), "`rank_pattern` has 1.0 for `q`, not an integer from 1 to 65536"),
        ("alpha_pattern", json!([]), "`alpha_pattern` is a list of 0, not an object of at most 100000 entries"),
        (
            "layers_to_transform",
            json!([1, true]),
            "`layers_to_transform` is a list of 2, not a list of at most 100000, each an integer",
        ),
        (
            "layer_replication",
            json!([[0, 20_000]]),
            "`layer_replication` is a list of 1, not a list of [start, end) pairs of at most 16384 layers",
        ),
        (
            "trainable_token_indices",
            json!({"e": [-1]}),
            "`trainable_token_indices` has a list of 1 for `e`, not a list of at most 100000, each an integer of at least 0",
        ),
        ("eva_config", json!("x"), "`eva_config` is \"x\", not an object"),
        ("init_lora_weights", json!(null), "`init_lora_weights` is null, not true, false or a string"),
        ("inference_mode", json!("no"), "`inference_mode` is \"no\", not true or false"),
    ] {
        let mut config = lora(json!({}));
        config[field] = value;
        assert_eq!(faults(&config), format!("adapter_config.json: {message}"));
    }
}

#[test]
fn all_faults_come_in_one_error() {
    let message = faults(&lora(json!({"r": true, "lora_alpha": "x", "use_rslora": null, "layers_pattern": "h"})));
    for field in ["`r`", "`lora_alpha`", "`use_rslora`", "`layers_pattern` needs `layers_to_transform`"] {
        assert!(message.contains(field), "{message}");
    }
    assert!(faults(&json!({"r": 8})).contains("`peft_type` is missing"));
}

#[test]
fn fields_that_contradict_each_other_are_faults() {
    let message = faults(&lora(json!({"target_modules": ".*q", "layers_to_transform": [1]})));
    assert!(message.contains("`layers_to_transform` only goes with a list"), "{message}");
    let message = faults(&json!({"peft_type": "IA3", "target_modules": ["k"], "feedforward_modules": ["w"]}));
    assert!(message.contains("1 of `feedforward_modules` are not among `target_modules`"), "{message}");
    let message = faults(&json!({"peft_type": "OFT", "r": 4}));
    assert!(message.contains("exactly one must be zero"), "{message}");
}

#[test]
fn what_is_kept_but_ignored_is_told() {
    let config = lora(json!({
        "megatron_core": "evil.module", "corda_config": {"cache_file": "/etc/passwd"}, "lora_alpha": -1, "new_key": 1,
        "kasa_config": {},
    }));
    let config = parse(&config).unwrap();
    let expected = [
        "`megatron_core` is kept but never used to open, fetch or import anything",
        "`cache_file` of `corda_config` is kept but never opened",
        "alpha is negative, so the update is subtracted",
        "keys unknown to LORA are ignored: `new_key`",
    ];
    assert_eq!(config.warnings, expected);
    assert_eq!(config.lora().unwrap().variants, ["kasa_config"]);
    let config =
        parse(&json!({"peft_type": "P_TUNING", "tokenizer_name_or_path": "x", "num_virtual_tokens": 3})).unwrap();
    assert_eq!(config.warnings.len(), 1);
    assert!(
        faults(&json!({"peft_type": "P_TUNING", "num_virtual_tokens": 1_000_000})).contains("`num_virtual_tokens`")
    );
}

#[test]
fn a_key_that_occurs_twice_is_told_however_it_is_spelled() {
    let config = AdapterConfig::parse(r#"{"peft_type": "LORA", "r": 4, "\u0072": 2}"#, "f").unwrap();
    assert_eq!(config.warnings, ["key `r` occurs twice; the last value counts"]);
    assert_eq!(config.lora().unwrap().r, 2);
}

#[test]
fn what_is_no_object_is_refused() {
    let deep = "[".repeat(200) + &"]".repeat(200);
    let many = format!("[{}0]", "0,".repeat(1_000_001));
    let cases = [
        ("[]", "is not a JSON object"),
        ("{", "is malformed JSON: EOF"),
        ("{} x", "is malformed JSON: trailing characters"),
        (r#"{"r": NaN}"#, "is malformed JSON"),
        (r#"{"a": 1e999}"#, "number out of range"),
        (deep.as_str(), "recursion limit"),
        (many.as_str(), "more than 1000000 values"),
    ];
    for (text, reason) in cases {
        let message = AdapterConfig::parse(text, "f").unwrap_err().to_string();
        assert!(message.starts_with("f: ") && message.contains(reason), "{message}");
    }
}

#[test]
fn patterns_decide_rank_and_scaling_first_come_first_served() {
    let config = lora(json!({
        "r": 8, "lora_alpha": 16, "rank_pattern": {"layers.1.q_proj": 4, "q_proj": 2}, "alpha_pattern": {"^q_proj": 6, "[vo]_proj": 1.5},
    }));
    let config = parse(&config).unwrap();
    let lora = config.lora().unwrap();
    for (module, expected) in [
        ("model.layers.1.q_proj", (4, 4.0)),
        ("model.layers.2.q_proj", (2, 8.0)),
        ("q_proj", (2, 3.0)),
        ("model.o_proj", (8, 1.5 / 8.0)),
        ("model.my_q_proj", (8, 2.0)),
    ] {
        assert_eq!(lora.rank_and_scaling(module).unwrap(), expected, "{module}");
    }
    let config = parse(&super::tests::lora(json!({"lora_alpha": 16, "r": 4, "use_rslora": true}))).unwrap();
    assert_eq!(config.lora().unwrap().rank_and_scaling("q").unwrap(), (4, 8.0));
    let config = parse(&super::tests::lora(json!({"rank_pattern": {"(": 4}}))).unwrap();
    assert!(matches!(config.lora().unwrap().rank_and_scaling("q"), Err(Error::Target(_))));
}

#[test]
fn saved_modules_hold_what_is_within_them() {
    let targeting = Targeting { modules_to_save: Some(vec!["head".into(), "a.score".into()]), ..Targeting::default() };
    for (path, expected) in [
        ("head", Some("head")),
        ("m.head.dense", Some("m.head")),
        ("x.a.score", Some("x.a.score")),
        ("myhead", None),
        ("score", None),
    ] {
        assert_eq!(targeting.saved(path), expected, "{path}");
    }
}

#[test]
fn a_folder_is_read_within_limits() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    assert!(read_text(path).unwrap_err().to_string().contains("adapter_config.json: is missing"));
    std::fs::write(path.join(ADAPTER_CONFIG), r#"{"peft_type": "IA3", "peft_type": "LORA"}"#).unwrap();
    let (text, warnings) = read_text(path).unwrap();
    assert!(text.starts_with('{'));
    assert_eq!(warnings, ["key `peft_type` occurs twice; the last value counts"]);
    assert!(AdapterConfig::read(path).unwrap().lora().is_some());
    std::fs::write(path.join(ADAPTER_CONFIG), b"{\"\xff\": 1}").unwrap();
    assert!(read_text(path).unwrap_err().to_string().contains("is not UTF-8 text"));
    std::fs::write(path.join(ADAPTER_CONFIG), vec![b' '; (16 << 20) + 1]).unwrap();
    assert!(read_text(path).unwrap_err().to_string().contains("at most 16777216 are read"));
}

#[test]
fn sizes_of_prompts_are_capped_and_their_choices_closed() {
    let good = json!({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 20, "num_layers": 32, "init_weights": null});
    parse(&good).unwrap();
    for (name, value) in [
        ("num_virtual_tokens", json!(0)),
        ("num_virtual_tokens", json!(true)),
        ("num_layers", json!(16_385)),
        ("token_dim", json!(65_537)),
        ("num_attention_heads", json!(2.0)),
        ("num_transformer_submodules", json!(3)),
        ("init_weights", json!("ones")),
    ] {
        let mut config = good.clone();
        config[name] = value;
        assert!(faults(&config).contains(&format!("`{name}`")), "{config}");
    }
    let init = |kind: &str| json!({"peft_type": kind, "prompt_tuning_init": "EXACT_SOURCE_TASK"});
    parse(&init("MULTITASK_PROMPT_TUNING")).unwrap();
    assert!(faults(&init("PROMPT_TUNING")).contains("`prompt_tuning_init`"));
    assert!(faults(&json!({"peft_type": "CPT", "cpt_token_ids": [1, -1]})).contains("`cpt_token_ids`"));
    assert!(faults(&json!({"peft_type": "P_TUNING", "encoder_dropout": 1.5})).contains("`encoder_dropout`"));
    assert!(faults(&json!({"peft_type": "CARTRIDGE", "num_frozen_tokens": -1})).contains("`num_frozen_tokens`"));
}
