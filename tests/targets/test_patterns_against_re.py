"""Patterns mean what they mean to CPython's `re`, or are refused with a line that says why: never a third
thing.
"""

import re
import unicodedata
import warnings
from collections.abc import Callable, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peftrs import _native

EVERYTHING = "(?s:.*)"
"""Selects all names, so that a test can look at what another field does to them."""

REFUSALS = ("has what is not supported:", "is too large", "needs more than", "takes too long")
"""What we may say of a pattern that CPython accepts."""

NAMES = [
    "q_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.v_proj",
    "model.layers.10.mlp.up_proj",
    "model.layers.21.mlp.experts.3.w1",
    "layers.2.q_proj",
    "transformer.h.3.attn.c_attn",
    "bert.encoder.layer.0.attention.self.query",
    "encoder.block.0.layer.0.SelfAttention.q",
    "decoder.block.11.layer.2.DenseReluDense.wi_0",
    "vision_tower.vision_model.encoder.layers.5.self_attn.q_proj",
    "language_model.model.layers.7.self_attn.o_proj",
    "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
    "mid_block.attentions.0.proj_in",
    "lm_head",
    "head",
    "myhead",
    "score.dense",
    "0",
    "0.1",
    "a-b.c d",
]

LEGITIMATE = [
    # PEFT's own tests and documentation, then configs of published adapters and of other libraries.
    ".*",
    ".*q_proj",
    r".*\.q_proj",
    r".*(q_proj|v_proj)$",
    r"(?:model\.)?layers\.\d+\.self_attn\.[qkvo]_proj",
    r"model\.layers\.(0|1|2|3)\.self_attn\.(q|v)_proj",
    r".*\.(to_k|to_q|to_v|to_out\.0)$",
    r".*layers\.(1[0-9]|2[0-9]).*(gate|up|down)_proj",
    r"^(?!.*lm_head).*$",
    r"^(?!.*(?:vision|visual)).*(?:q_proj|v_proj)$",
    r".*language_model\..*\.(q_proj|v_proj)",
    r".*(?<!vision_model)\.encoder\.layers\.\d+\.self_attn\.q_proj",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.q_proj)",
    r"(?i).*Q_PROJ",
    r"(?i:MODEL)\..*",
    r"(?x) .* \. (?: q | v ) _proj  # attention only",
    r"[^.]+\.[^.]+\.\d+\.[^.]+\.q_proj",
    r"[\w.]+\.h\.\d+\.attn\.c_attn",
    r"(?P<stack>encoder|decoder)\.block\.\d+\.layer\.0\..*",
    r"(?:encoder|decoder)\.(\w+)\.\d+\.layer\.\d+\.(?:SelfAttention|DenseReluDense)\.(?:q|wi_[01])",
    r".+\.(?=q_proj$).+",
    r"\Aq_proj\Z",
    r"q_proj|v_proj|k_proj|o_proj",
    r"model\.layers\.([0-9]|1[0-5])\..*",
    r".*\.\d{2,}\..*",
    r".*\.\d{,1}\..*",
    r".*_proj+",
    r".*?\.attn\d?\..*",
    r"\S+\.\d+\.\w*",
    r"(?:(?:model\.)?layers\.\d++\.)?(?>self_attn\.)?q_proj",
    r"(\w+)\.(\w+)\.(\d+)\.(\w+)\.(?:q_proj|\4)",
    r".*\.(\d)\..*\.\1\..*",
    "",
    "q_proj|",
    r"a\-b\.c\ d",
    r"[a-z\-]+\.[\w ]+",
    r"[]a-z_.0-9]+",
    r"[^\d\s]+",
    r"\x71_proj|\154m_head|\u0068ead|\U00000068ead",
]

KEYS = [
    "q_proj",
    "layers.1.self_attn.v_proj",
    r"layers\.1\.self_attn\.v_proj",
    "^q_proj",
    "^model.layers.0.self_attn.q_proj",
    r"^model\.layers\.0",
    "self_attn.*",
    "[qv]_proj",
    r".*layers.(10|21)\..*",
    "q_proj|v_proj",
    "proj",
    r"(\w)_proj",
    r"(q)_(?:\3)?proj",
    "^q_proj|v_proj$",
    "_proj)|(head",
    r"(?<=self_attn\.)q_proj",
    "lm_head$",
    "",
    ".",
    "c d",
]


def expected(pattern: str, names: Sequence[str], find: Callable[[str, str], object]) -> list[str] | None:
    """The names that CPython finds, or none if it refuses the pattern."""
    with warnings.catch_warnings():
        # Sets that may one day be nested, as `[[a]`.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            find(pattern, "none")  # so that a pattern is refused where there are no names as well
            return [name for name in names if find(pattern, name)]
        except (re.error, OverflowError, RecursionError):
            return None


def by_target(pattern: str, names: Sequence[str]) -> list[str]:
    return _native.select(names, target_modules=pattern).targets


def by_key(pattern: str, names: Sequence[str]) -> list[str]:
    selection = _native.select(names, target_modules=EVERYTHING, patterns={"rank_pattern": [pattern]})
    return [
        name
        for name, index in zip(selection.targets, selection.pattern_index("rank_pattern"), strict=True)
        if index == 0
    ]


def by_saved(pattern: str, names: Sequence[str]) -> list[str]:
    kept = _native.select(names, target_modules=EVERYTHING, modules_to_save=[pattern]).targets
    return [name for name in names if name not in kept]


def by_layer(pattern: str, names: Sequence[str]) -> list[str]:
    ends = [name.rpartition(".")[2] for name in names]
    return _native.select(
        names, target_modules=ends, layers_to_transform=[0, 1, 3], layers_pattern=[pattern]
    ).targets


def find_key(pattern: str, name: str) -> object:
    return re.match(rf"(.*\.)?({pattern})$", name)


def find_saved(pattern: str, name: str) -> object:
    return re.match(rf"(^|.*\.){pattern}($|\..*)", name)


def find_layer(pattern: str, name: str) -> object:
    match = re.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", name)
    return match and match.group("idx") and int(match.group("idx")) in {0, 1, 3}


ROLES: dict[str, tuple[Callable[[str, Sequence[str]], list[str]], Callable[[str, str], object]]] = {
    "target_modules": (by_target, re.fullmatch),
    "rank_pattern": (by_key, find_key),
    "modules_to_save": (by_saved, find_saved),
    "layers_pattern": (by_layer, find_layer),
}


def compare(role: str, pattern: str, names: Sequence[str]) -> str | None:
    """Holds us to CPython; returns why we refused, if we did."""
    ours, theirs = ROLES[role]
    if role == "layers_pattern":
        # A name that is an entry of the list is taken whatever its layer.
        names = [name for name in names if "." in name and not name.endswith(".")]
    names = [name for name in dict.fromkeys(names) if name]
    wanted = expected(pattern, names, theirs)
    try:
        found = ours(pattern, names)
    except _native.TargetError as error:
        message = str(error)
        assert message.startswith(role), message
        if wanted is not None:
            assert any(refusal in message for refusal in REFUSALS), message
        return message
    assert wanted is not None, f"CPython refuses {pattern!r}, which matched {found}"
    assert found == wanted, f"{role}: {pattern!r}"
    return None


@pytest.mark.parametrize("pattern", LEGITIMATE)
def test_legitimate_patterns_are_all_understood(pattern: str) -> None:
    assert compare("target_modules", pattern, NAMES) is None


@pytest.mark.parametrize("pattern", KEYS)
@pytest.mark.parametrize("role", ["rank_pattern", "modules_to_save", "layers_pattern"])
def test_keys_are_wrapped_as_peft_does(role: str, pattern: str) -> None:
    compare(role, pattern, NAMES)
    if role == "rank_pattern":
        assert compare(role, pattern, NAMES) is None


def letters(text: str) -> st.SearchStrategy[str]:
    return st.sampled_from(list(text))


names = st.lists(
    st.text(letters("aabb01._-AkK sS\n") | letters("éßıİſ\u212a٣²\u2028\x1c·字"), min_size=1, max_size=8),
    min_size=1,
    max_size=8,
)

atoms = st.one_of(
    letters("aabb01_.-AkKsS "),
    st.sampled_from(
        [
            r"\d",
            r"\D",
            r"\w",
            r"\W",
            r"\s",
            r"\S",
            r"\b",
            r"\B",
            r"\A",
            r"\Z",
            "^",
            "$",
            ".",
            r"\.",
            r"\n",
            r"\x61",
            r"\141",
            r"\u0062",
        ]
    ),
    st.sampled_from(
        [
            "[ab]",
            "[^ab]",
            "[a-c0]",
            "[^\\d]",
            "[\\w.]",
            "[]a]",
            "[^]a]",
            "[a\\-b]",
            "[-a]",
            "[a-]",
            "[[a]",
            "[a&&b]",
            "[a--b]",
            "[\\b]",
        ]
    ),
    st.sampled_from(
        [
            r"\1",
            r"\2",
            "(?P=n)",
            "(?(1)a|b)",
            "(?(2)a)",
            "(?i:a)",
            "(?s:.)",
            "(?-i:A)",
            "(?a:\\w)",
            "(?m:^)",
            "(?m:$)",
            "é",
            "字",
            "İ",
        ]
    ),
)


def combine(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    quantifier = st.sampled_from(
        [
            "",
            "*",
            "+",
            "?",
            "*?",
            "+?",
            "??",
            "*+",
            "++",
            "?+",
            "{2}",
            "{1,2}",
            "{,2}",
            "{1,}",
            "{0}",
            "{,}",
            "{",
            "{}",
            "{1",
            "{a}",
        ]
    )
    opening = st.sampled_from(
        ["(", "(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>", "(?P<n>", "(?i:", "(?x:", "(?a:", "(?#"]
    )
    return st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.lists(inner, min_size=1, max_size=3).map("|".join),
        st.tuples(inner, quantifier).map("".join),
        st.tuples(opening, inner).map(lambda pair: "".join(pair) + ")"),
    )


patterns = st.one_of(
    st.tuples(
        st.sampled_from(["", "", "", "(?i)", "(?s)", "(?m)", "(?x)", "(?a)", "(?im)", "(?ai)"]),
        st.recursive(atoms, combine, max_leaves=8),
    ).map("".join),
    st.text(letters(r"ab01._()[]{}*+?|^$\dwsbBAZ:=!<>iP,#- "), max_size=12),
)


@settings(max_examples=1000)
@given(st.sampled_from(sorted(ROLES)), patterns, names)
@example("target_modules", r"\B", ["a", "ab"])
@example("target_modules", r"a\b.*", ["a", "aé", "a-"])
@example("target_modules", "(?i)i|k|s", ["i", "I", "ı", "İ", "k", "\u212a", "ſ", "S"])
@example("target_modules", "(?ai)i|k|s", ["i", "I", "ı", "İ", "k", "\u212a", "ſ", "S"])
@example("rank_pattern", "a", ["a\n", "b.a\n", "a\n\n", "b\n.a"])
@example("modules_to_save", "a", ["a\n", "b.a\n", "a\nb", "b\n.a", "a.\n"])
@example("layers_pattern", "a|b", ["a.0.x", "x.b.1.y", "b.3.z", "a.b.2.z"])
@example("target_modules", "[" + "a" * 3, ["a"])
def test_any_pattern_means_the_same_or_is_refused(role: str, pattern: str, names: list[str]) -> None:
    compare(role, pattern, names)


@pytest.mark.parametrize(
    "pattern",
    [
        r"\d",
        r"\D",
        r"\w",
        r"\W",
        r"\s",
        r"\S",
        r"(?a)\w",
        r"(?a)\s",
        r".\b",
        ".",
        "(?s).",
        r"[^\W\d]",
        "(?i)[a-z]",
    ],
)
def test_classes_hold_the_characters_that_they_hold_in_python(pattern: str) -> None:
    # Those that this Python knows, since later versions of Unicode assign more; beyond are ideographs, all
    # alike.
    characters = [
        chr(code) for code in range(1, 0x20000) if unicodedata.category(chr(code)) not in {"Cn", "Cs"}
    ]
    for start in range(0, len(characters), 5000):
        assert compare("target_modules", pattern, characters[start : start + 5000]) is None


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("q_proj(", "is malformed: missing ), unterminated subpattern"),
        (
            r"(a|aa)+\1[b-z]c",
            "needs more than 50000 steps for one name; say it more simply, or list the names",
        ),
    ],
)
def test_a_refusal_names_the_field_the_pattern_and_the_reason(pattern: str, reason: str) -> None:
    with pytest.raises(_native.TargetError) as caught:
        _native.select(["a" * 64 + "c"], target_modules=pattern)
    assert str(caught.value) == f"target_modules: pattern `{pattern}` {reason}"
