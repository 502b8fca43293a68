import pytest
from hypothesis import given
from hypothesis import strategies as st

from excite.errors import UsageError
from excite.spec import Spec, UnitSpec, parse_spec

words = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,12}", fullmatch=True)
keys = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,12}", fullmatch=True)
values = st.from_regex(r"[A-Za-z0-9_.-]{1,12}", fullmatch=True)
arguments = st.dictionaries(keys, values, max_size=4).map(lambda items: tuple(items.items()))
unit_specs = st.builds(UnitSpec, words, arguments)
specs = st.builds(Spec, words, st.none() | words, arguments, st.lists(unit_specs, max_size=3).map(tuple))


@given(specs)
def test_text_and_back(spec):
    assert parse_spec(str(spec)) == spec


@given(st.text(alphabet="ab1_.:=,+- ", max_size=24))
def test_any_text_is_read_or_refused_and_what_is_read_is_canonical(text):
    try:
        spec = parse_spec(text)
    except UsageError:
        return
    assert str(spec) == text


@given(specs)
def test_text_is_safe_in_a_shell_and_as_a_folder_name(spec):
    # Everything bash could act on: blanks, quotes, globs, redirections, expansions, history, and the path separator.
    assert not set(str(spec)) & set(" \t\n'\"\\*?[]{}()<>|&;$`!#~^%/")
    assert str(spec) not in (".", "..")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("resnet50", Spec("resnet50")),
        ("resnet50:stride_in=1x1", Spec("resnet50", arguments=(("stride_in", "1x1"),))),
        ("torchvision:resnet50", Spec("resnet50", source="torchvision")),
        ("timm:resnet50.a1_in1k", Spec("resnet50.a1_in1k", source="timm")),
        ("timm:net:a=1,b=x", Spec("net", source="timm", arguments=(("a", "1"), ("b", "x")))),
        (
            "resnet20+se:reduction=8,stages=1-2+sk",
            Spec("resnet20", units=(UnitSpec("se", (("reduction", "8"), ("stages", "1-2"))), UnitSpec("sk"))),
        ),
        (
            "timm:convnext_tiny:drop=0.1+se",
            Spec("convnext_tiny", "timm", (("drop", "0.1"),), (UnitSpec("se"),)),
        ),
    ],
)
def test_grammar(text, expected):
    assert parse_spec(text) == expected
    assert parse_spec(expected) is expected


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "''"),
        ("resnet20+", "''"),
        ("+se", "''"),
        ("resnet 20", "'resnet 20'"),
        ("-resnet20", "'-resnet20'"),
        ("../etc", "'../etc'"),
        ("resnet20:", "''"),
        ("resnet20:width=", "'width='"),
        ("resnet20:=2", "'=2'"),
        ("resnet20:width=2,", "''"),
        ("resnet20:width=2,width=3", "'width=3'"),
        ("resnet20:width=2:depth=3", "':depth=3'"),
        ("a:b:c=1:d", "':d'"),
        ("resnet20:width==2", "'width==2'"),
        ("resnet20+se:reduction", "'reduction'"),
        ("resnet20+torchvision:se", "'torchvision:se'"),
        ("resnet20:width=a b", "'width=a b'"),
        ("résnet", "'résnet'"),
    ],
)
def test_malformed_text_is_refused_with_the_part_that_is_wrong(text, part):
    with pytest.raises(UsageError) as refusal:
        parse_spec(text)
    quoted = part if part != "'torchvision:se'" else "'se'"
    assert quoted in str(refusal.value)
    assert repr(text) in str(refusal.value)


def test_only_text_is_a_spec():
    with pytest.raises(UsageError, match="not int"):
        parse_spec(20)


def test_the_parser_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, excite.spec, excite.networks.catalog; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
