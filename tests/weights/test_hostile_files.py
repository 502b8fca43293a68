"""Files that mean harm, or that chance has spoilt: one sentence, and no memory taken."""

import io
import pickle
import tracemalloc
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from excite.create import create
from excite.errors import ExciteError
from excite.weights.load import load_weights, read_weights


def torch_bytes(zipped=True):
    file = io.BytesIO()
    state = {"fc.weight": torch.arange(20.0).view(4, 5), "fc.bias": torch.zeros(4)}
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


WHOLE = {
    "zip": torch_bytes(),
    "pickle": torch_bytes(zipped=False),
    "safetensors": save({"fc.weight": torch.zeros(4, 5), "fc.bias": torch.zeros(4)}),
}


def read(content, folder):
    path = folder / "weights"
    path.write_bytes(content)
    return read_weights(path)


@pytest.mark.parametrize("kind", WHOLE)
def test_the_whole_ones_can_be_read(kind, tmp_path):
    assert read(WHOLE[kind], tmp_path).outputs == 4


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=400))
def test_any_bytes(content, tmp_path):
    with pytest.raises(ExciteError):
        read(content, tmp_path)


@pytest.mark.parametrize("kind", WHOLE)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_bytes(kind, data, tmp_path):
    content = bytearray(WHOLE[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    tracemalloc.start()
    message = ""
    try:
        read(bytes(content), tmp_path)
    except ExciteError as error:
        message = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 50_000_000
    assert len(message) < 2000


@pytest.mark.parametrize("kind", WHOLE)
def test_cut_off_anywhere(kind, tmp_path):
    content, path = WHOLE[kind], tmp_path / "weights"
    network = torch.nn.ModuleDict({"fc": torch.nn.Linear(5, 4)})
    for end in range(0, len(content) - 1, 7):
        path.write_bytes(content[:end])
        with pytest.raises(ExciteError):
            load_weights(network, path)


def test_a_zip_bomb(tmp_path):
    """A gigabyte of zeros in a megabyte."""
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        with archive.open("archive/data/0", "w", force_zip64=True) as entry:
            for _ in range(64):
                entry.write(bytes(1 << 22))
    assert path.stat().st_size < 1_000_000
    with pytest.raises(ExciteError, match="unpacks to more than it holds"):
        read_weights(path)


class Harm:
    def __reduce__(self):
        return (exec, ("raise SystemExit('harm')",))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("inside", [Harm(), {"state_dict": Harm()}, {"fc.weight": torch.zeros(1), "extra": Harm()}])
def test_code_in_a_pickle_is_not_run(inside, zipped, tmp_path):
    torch.save(inside, tmp_path / "weights.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ExciteError, match="could run code"):
        create("resnet20", weights=tmp_path / "weights.pth")


def test_a_tensor_that_claims_more_than_it_has(tmp_path):
    """A view with stride 0 looks like 40 GB and takes four bytes; only its shape may be looked at."""
    huge = torch.zeros(1).expand(100_000, 100_000)
    torch.save({"conv1.weight": huge}, tmp_path / "weights.pth")
    network = create("resnet20", 10)
    with pytest.raises(ExciteError, match=r"conv1\.weight claims the shape \(100000, 100000\)"):
        load_weights(network, tmp_path / "weights.pth")


def test_a_huge_classifier_is_not_built(tmp_path):
    huge = torch.zeros(1).expand(2_000_000_000, 64)
    torch.save({**create("resnet20", 10).state_dict(), "fc.weight": huge}, tmp_path / "weights.pth")
    with pytest.raises(ExciteError, match=r"fc\.weight claims"):
        create("resnet20", weights=tmp_path / "weights.pth")
