"""Texts in tables: the folder's own tokens, the right row, and one line where that cannot be."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import contents
from test_tables import stored, written

from compressor.data import adopt, read
from compressor.data.demand import OnDemand, targets
from compressor.data.tokens import tokens
from compressor.errors import InputError
from compressor.task import UNLABELLED, Split
from compressor.training.loader import batches

pytest.importorskip("pyarrow", reason="needs the extra compressor[tables]")
tokenizers = pytest.importorskip("tokenizers", reason="needs the extra compressor[transformers]")

PARTS = ("train", "validate", "test")
WORDS = ["[P]", "[C]", "[S]", "[U]", "a", "b", "c", *(f"n{at}" for at in range(60))]


def folder(path: Path, types: int = 1) -> Path:
    """The folder of a model whose tokenizer knows :data:`WORDS`; [C] and [S] stand around them."""
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="[U]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[C] $A [S]",
        pair="[C] $A [S] $B:1 [S]:1",
        special_tokens=[("[C]", 1), ("[S]", 2)],
    )
    path.mkdir()
    config = {"vocab_size": len(WORDS), "max_position_embeddings": 20, "pad_token_id": 0}
    (path / "config.json").write_text(json.dumps({**config, "type_vocab_size": types}))
    made.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("model") / "one")


def said(ids: Sequence[int]) -> list[str]:
    """The words behind tokens, without what stands around them."""
    return [WORDS[at] for at in ids if at > 2]


def numbered(path: Path, count: int = 40, **more: Sequence[Any]) -> Path:
    """Row ``at`` says so in its text, and has the label ``at % 3``."""
    names = ("text", "y", *more)
    columns = zip(*more.values(), strict=True) if more else [()] * count
    rows = [(f"a n{at} b", "uvw"[at % 3], *each) for at, each in enumerate(columns)]
    return written(path, names, rows, "\t" if ".tsv" in path.name else ",")


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".csv.gz", ".parquet"])
def test_texts_and_their_labels(tmp_path: Path, model: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    if ending == ".parquet":
        texts = [f"a n{at} b" for at in range(40)]
        stored(path, text=texts, y=["uvw"[at % 3] for at in range(40)])
    else:
        numbered(path)
    spec = f"text:{path}?text=text&target=y&tokenizer={model}&length=8"
    data = read(spec, 2)
    assert (data.name, data.kind, data.outputs) == (spec, "classification", 3)
    seen = []
    for part in PARTS:
        split = getattr(data.splits, part)
        assert isinstance(split.fetch, OnDemand)
        (ids, mask), y = split.head(99)
        assert ids.shape == mask.shape == (len(split), 8)
        assert {ids.dtype, mask.dtype, y.dtype} == {np.dtype(np.int64)}
        rows = [int(said(each)[1][1:]) for each in ids]
        assert y.tolist() == [row % 3 for row in rows]
        np.testing.assert_array_equal(np.concatenate(list(targets(split, 5))), y)
        assert mask.tolist() == [[1] * 5 + [0] * 3] * len(split)
        seen += rows
    assert sorted(seen) == list(range(40))
    assert adopt(data) is data
    assert read(spec, 3).splits.test.digest() != data.splits.test.digest()


def test_tokens_are_those_of_the_folder(tmp_path: Path) -> None:
    """Pairs, types of tokens, and the length that the model takes."""
    model = folder(tmp_path / "model", types=2)
    rows = [(f"a n{at}", f"c n{at} b", at / 4) for at in range(30)]
    path = written(tmp_path / "a.csv", ("q", "r", "y"), rows)
    data = read(f"text:{path}?text=q,r&target=y&tokenizer={model}")
    # As a model of such scores was trained: as they are.
    assert (data.kind, data.outputs) == ("regression", 1)
    inputs, y = data.splits.train.head(30)
    assert (y.dtype, y.shape) == (np.float32, (len(data.splits.train), 1))
    order = (y[:, 0] * 4).astype(int)
    wanted = tokens(model, [rows[at][:2] for at in order])
    assert [each.shape for each in inputs] == [(len(y), 20)] * 3
    for mine, theirs in zip(inputs, wanted, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_without_a_target_no_text_has_a_label(tmp_path: Path, model: Path) -> None:
    path = numbered(tmp_path / "a.csv")
    data = read(f"text:{path}?text=text&tokenizer={model}")
    assert (data.labelled, data.kind) == (False, None)
    assert {int(each) for part in PARTS for each in contents(getattr(data.splits, part))[1]} == {
        UNLABELLED
    }


def test_two_classes_have_two_outputs(tmp_path: Path, model: Path) -> None:
    """As Hugging Face's heads have; ``kind=binary`` says otherwise."""
    path = written(tmp_path / "a.csv", ("t", "y"), [(f"n{at}", at % 2) for at in range(20)])
    spec = f"text:{path}?text=t&target=y&tokenizer={model}"
    assert (read(spec).kind, read(spec).outputs) == ("classification", 2)
    spec += "&kind=binary"
    assert (read(spec).kind, read(spec).outputs) == ("binary", 1)


@settings(max_examples=30)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12),
        min_size=8,
        max_size=20,
    )
)
def test_any_text_comes_back(
    tmp_path_factory: pytest.TempPathFactory, model: Path, drawn: list[str]
) -> None:
    """Quotes, lines, NULL and what else stands in it: the tokens are those of the text itself."""
    path = tmp_path_factory.getbasetemp() / "any-texts.csv"
    rows = [(text, at / 2 + 0.25) for at, text in enumerate(drawn)]
    written(path, ("t", "y"), rows)
    splits = read(f"text:{path}?text=t&target=y&tokenizer={model}").splits
    for part in PARTS:
        (ids, mask), y = getattr(splits, part).head(99)
        wanted = tokens(model, [drawn[int(each)] for each in (y[:, 0] * 2).tolist()])
        np.testing.assert_array_equal(ids, wanted[0])
        np.testing.assert_array_equal(mask, wanted[1])


def test_what_tables_call_missing_is_a_word(tmp_path: Path, model: Path) -> None:
    rows = [(["NA", "null", "nan", "", "a"][at % 5], at + 0.5) for at in range(20)]
    path = written(tmp_path / "a.csv", ("t", "y"), rows)
    (ids, _), y = read(f"text:{path}?text=t&target=y&tokenizer={model}").splits.train.head(20)
    wanted = [["[U]"], ["[U]"], ["[U]"], [], ["a"]]
    assert [said(each) for each in ids] == [wanted[int(at) % 5] for at in y[:, 0]]


def test_threads_read_the_same(tmp_path: Path, model: Path) -> None:
    path = numbered(tmp_path / "a.csv")
    train = read(f"text:{path}?text=text&target=y&tokenizer={model}").splits.train
    steps = np.array_split(np.random.default_rng(0).permutation(len(train)), 6)
    alone, together = (
        [ids.numpy().tobytes() for (ids, _), _ in batches(train, steps, workers=count, pin=False)]
        for count in (0, 3)
    )
    assert alone == together


def test_a_second_file(tmp_path: Path, model: Path) -> None:
    path = numbered(tmp_path / "a.csv")
    more = written(tmp_path / "b.tsv", ("y", "text"), [("w", "n50"), ("u", "n51")], "\t")
    spec = f"text:{path}?text=text&target=y&tokenizer={model}&test="
    (ids, _), y = read(spec + str(more)).splits.test.head(9)
    assert [said(each) for each in ids] == [["n50"], ["n51"]]
    assert y.tolist() == [2, 0]
    strange = written(tmp_path / "c.csv", ("y", "text"), [("w", "n50"), ("z", "n51")])
    with pytest.raises(InputError, match="holds 'z', none of train's classes"):
        read(spec + str(strange))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "option text is missing"),
        ("?text=text", "option tokenizer is missing: add [?]tokenizer="),
        ("?text=gone&tokenizer={model}", "no column 'gone', only 'text', 'y', 'score'"),
        ("?text=text,y,score&tokenizer={model}", "text=text,y,score names 3 columns: give 1 or 2"),
        ("?text=text&target=gone&tokenizer={model}", "no column 'gone'"),
        ("?text=text&target=score&tokenizer={model}", "target 'score' is missing in 2 of 40 rows"),
        ("?text=text&target=y&tokenizer=/gone", "/gone is no folder"),
        ("?text=text&target=y&tokenizer={model}&length=21", "takes from 4 to 20"),
        ("?text=text&target=y&tokenizer={model}&length=0", "option length='0'"),
        ("?text=text&target=y&tokenizer={model}&kind=regression", "holds strings, no amounts"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, model: Path, options: str, message: str) -> None:
    score = [None if at in (3, 9) else at / 8 for at in range(40)]
    path = numbered(tmp_path / "a.csv", score=score)
    with pytest.raises(InputError, match=message) as caught:
        read(f"text:{path}{options.format(model=model)}")
    assert str(caught.value).isprintable()


def test_text_is_strings(tmp_path: Path, model: Path) -> None:
    path = stored(tmp_path / "a.parquet", t=list(range(20)), y=[1, 2] * 10)
    with pytest.raises(InputError, match="column 't' is of type int64: text is strings"):
        read(f"text:{path}?text=t&target=y&tokenizer={model}")


@pytest.mark.parametrize("name", ["pyarrow", "tokenizers"])
def test_a_missing_package_says_what_to_install(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = numbered(tmp_path / "a.csv")
    monkeypatch.setitem(sys.modules, name, None)
    extra = {"pyarrow": "tables", "tokenizers": "transformers"}[name]
    with pytest.raises(InputError, match=rf"pip install 'compressor\[{extra}\]'$"):
        read(f"text:{path}?text=text&target=y&tokenizer={model}")


@given(st.integers(0, 100_000), st.binary(max_size=4), st.integers(0, 3))
def test_changed_files_never_surprise(
    tmp_path_factory: pytest.TempPathFactory, model: Path, at: int, change: bytes, gone: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed-texts.csv"
    content = numbered(path).read_bytes()
    at %= len(content)
    path.write_bytes(content[:at] + change + content[at + gone :])
    try:
        splits = read(f"text:{path}?text=text&target=y&tokenizer={model}").splits
    except InputError as error:
        said_so = str(error)
    else:
        said_so = ""
        parts: list[Split] = [getattr(splits, part) for part in PARTS]
        assert sum(len(part.head(99)[1]) for part in parts) <= 44
    assert not said_so or said_so.isprintable()
