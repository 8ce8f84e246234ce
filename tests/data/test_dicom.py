"""Protect `python -m data.dicom`, which turns DICOM files into PNG pictures.

Checked: grey values as DICOM defines them, with pydicom's own VOI functions as the oracle; files of
every kind that people have; and that one file that gives no picture costs no other.

The files are written by the tests. Run: pytest tests/data/test_dicom.py
"""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data.table
from data.dicom import MISSING, main, windowed
from data.examples import read_jsonl
from data.images import scaled_to_8_bits

pydicom = pytest.importorskip("pydicom")
from pydicom.dataset import FileDataset, FileMetaDataset  # noqa: E402
from pydicom.encaps import encapsulate  # noqa: E402
from pydicom.pixels import apply_windowing  # noqa: E402
from pydicom.sequence import Sequence  # noqa: E402
from pydicom.uid import (  # noqa: E402
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    RLELossless,
    generate_uid,
)

# 12 bits, from 0 to 4095
VALUES = np.linspace(0, 4095, 30 * 40).round().astype(np.uint16).reshape(30, 40)


def dataset(
    values: np.ndarray | None = VALUES, *, bits: int = 12, syntax=None, **tags
) -> FileDataset:
    """Make a DICOM file in memory: a digital radiograph unless tags say otherwise."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax or ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    made = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    made.SOPClassUID, made.SOPInstanceUID = (
        meta.MediaStorageSOPClassUID,
        meta.MediaStorageSOPInstanceUID,
    )
    made.PatientID, made.Modality = "P1", "DX"
    if values is not None:
        colour = values.ndim == 3 and values.shape[-1] == 3
        made.Rows, made.Columns = (
            values.shape[:2] if colour or values.ndim == 2 else values.shape[1:]
        )
        made.SamplesPerPixel = 3 if colour else 1
        made.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
        if colour:
            made.PlanarConfiguration = 0
        made.BitsAllocated = 8 * values.dtype.itemsize
        made.BitsStored = min(bits, made.BitsAllocated)
        made.HighBit = made.BitsStored - 1
        made.PixelRepresentation = int(values.dtype.kind == "i")
        made.PixelData = values.tobytes()
        if values.ndim == 3 and not colour:
            made.NumberOfFrames = len(values)
    for name, value in tags.items():
        setattr(made, name, value)
    return made


def save(made: FileDataset, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    little = made.file_meta.TransferSyntaxUID != ExplicitVRBigEndian
    implicit = made.file_meta.TransferSyntaxUID == ImplicitVRLittleEndian
    pydicom.dcmwrite(
        path, made, implicit_vr=implicit, little_endian=little, enforce_file_format=True
    )
    return path


@pytest.fixture
def shown(tmp_path):
    """Convert one file: `shown(dataset, *flags)` -> its pixels."""

    def run(made: FileDataset, *flags: str) -> np.ndarray:
        save(made, tmp_path / "in" / "a.dcm")
        assert main([str(tmp_path / "in"), "--output_dir", str(tmp_path / "out"), *flags]) == 0
        picture = Image.open(tmp_path / "out" / "a.png")
        assert picture.mode in ("L", "RGB") and not picture.info
        return np.asarray(picture)

    return run


def eight_bits(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return ((values - low) / (high - low) * 255).round().astype(np.uint8)


# ---- grey values ---------------------------------------------------------------------------------
def test_without_a_window_the_whole_range_is_taken(shown):
    assert (shown(dataset()) == eight_bits(VALUES.astype(float), 0, 4095)).all()


def test_a_hot_pixel_does_not_darken_the_rest(shown):
    values = VALUES.copy()
    values[0, 0] = 65535
    found = shown(dataset(values, bits=16))
    assert (found == scaled_to_8_bits(values)[0]).all() and found[15, 20] > 80


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID", None])
@pytest.mark.parametrize(
    ("center", "width"), [(2048, 4096), (1000, 600), (3000.5, 1.0), (50, 2000)]
)
def test_a_window_is_applied_as_pydicom_does(shown, function, center, width):
    tags = {"WindowCenter": center, "WindowWidth": width}
    tags |= {"VOILUTFunction": function} if function else {}
    made = dataset(**tags)
    expected = apply_windowing(VALUES, made)  # 0 to 4095
    assert np.abs(shown(made).astype(int) - expected / 4095 * 255).max() <= 0.51


def test_a_window_by_hand():
    """Window 2048 +- 2048: C.11.2.1.2.1 with c = 2048, w = 4096."""
    values = np.array([0.0, 2047.5, 4095.0, -5.0, 9000.0])
    assert windowed(values, 2048, 4096, "LINEAR").tolist() == [0.0, 0.5, 1.0, 0.0, 1.0]
    assert windowed(values[:1], 0, 4, "LINEAR_EXACT").tolist() == [0.5]
    found = windowed(np.array([0.0, 1e9, -1e9]), 0, 4, "SIGMOID")
    assert found.round(9).tolist() == [0.5, 1.0, 0.0]
    assert windowed(np.array([7.4, 7.6]), 8, 1, "LINEAR").tolist() == [0.0, 1.0]


def test_the_first_of_several_windows_is_taken(shown):
    made = dataset(WindowCenter=[1000, 3000], WindowWidth=[600, 100])
    expected = apply_windowing(VALUES, dataset(WindowCenter=1000, WindowWidth=600))
    assert np.abs(shown(made) - expected / 4095 * 255).max() <= 0.51


@pytest.mark.parametrize(
    "tags",
    [
        {"WindowCenter": 9},
        {"WindowCenter": 9, "WindowWidth": 0},
        {"WindowWidth": "", "WindowCenter": ""},
    ],
)
def test_a_window_that_says_nothing_is_passed_over(shown, tags):
    assert (shown(dataset(**tags)) == eight_bits(VALUES.astype(float), 0, 4095)).all()


def test_monochrome1_is_inverted(shown):
    made = dataset(PhotometricInterpretation="MONOCHROME1", WindowCenter=2048, WindowWidth=4096)
    assert (shown(made) == 255 - eight_bits(VALUES.astype(float), 0, 4095)).all()


def test_rescaling_comes_before_the_window(shown):
    """Stored 0..4095, slope 2, intercept -1000: the window is in the rescaled values."""
    made = dataset(RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=1000, WindowWidth=2001)
    expected = np.clip((VALUES * 2.0 - 1000 - 999.5) / 2000 + 0.5, 0, 1) * 255
    assert np.abs(shown(made) - expected).max() <= 0.51


def test_a_modality_table_comes_before_the_window(shown):
    item = pydicom.Dataset()
    item.LUTDescriptor, item.ModalityLUTType = [4096, 0, 16], "US"
    item.LUTData = np.arange(4095, -1, -1, dtype="<u2").tobytes()  # inverts
    made = dataset(ModalityLUTSequence=Sequence([item]), WindowCenter=2048, WindowWidth=4096)
    assert (shown(made) == eight_bits(4095.0 - VALUES, 0, 4095)).all()


@pytest.mark.parametrize(("bits", "word"), [(8, "u1"), (8, "<u2"), (12, "<u2"), (16, "<u2")])
def test_a_voi_table_goes_before_the_window(shown, bits, word):
    top = 2**bits - 1
    item = pydicom.Dataset()
    item.LUTDescriptor = [4096, 0, bits]
    table = np.array([round((i / 4095) ** 2 * top) for i in range(4096)])
    item.LUTData = table.astype(word).tobytes()
    made = dataset(VOILUTSequence=Sequence([item]), WindowCenter=1, WindowWidth=2)
    assert np.abs(shown(made) - table[VALUES] / top * 255).max() <= 0.51


def test_signed_values(shown):
    values = VALUES.astype(np.int16) - 2048
    made = dataset(values, WindowCenter=0, WindowWidth=4096)
    assert (shown(made) == eight_bits(VALUES.astype(float), 0, 4095)).all()


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_does_not_count(shown, photometric):
    values = VALUES.copy() // 4 + 1000  # 1000 to 2023
    values[:5] = 4095
    made = dataset(values, PixelPaddingValue=4095, PhotometricInterpretation=photometric)
    made["PixelPaddingValue"].VR = "US"
    found = shown(made)
    assert (found[:5] == 0).all() and {int(found[5:].min()), int(found[5:].max())} == {0, 255}


def test_eight_bits(shown):
    values = (VALUES // 16).astype(np.uint8)
    assert (shown(dataset(values, bits=8)) == values).all()


def test_colour(shown):
    values = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    assert (shown(dataset(values, bits=8)) == values).all()


def test_colour_by_planes(shown):
    values = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    made = dataset(values, bits=8, PlanarConfiguration=1)
    made.PixelData = values.transpose(2, 0, 1).tobytes()
    assert (shown(made) == values).all()


def test_luminance_and_colour_differences_become_rgb(shown):
    grey = np.full((30, 40, 3), 128, dtype=np.uint8)
    grey[..., 0] = 200  # Y 200, no colour
    made = dataset(grey, bits=8, PhotometricInterpretation="YBR_FULL")
    assert np.abs(shown(made).astype(int) - 200).max() <= 1


def test_a_palette(shown):
    values = np.tile(np.arange(4, dtype=np.uint8), (30, 10))
    made = dataset(values, bits=8, PhotometricInterpretation="PALETTE COLOR")
    table = np.array([0, 80, 160, 255], dtype=np.uint16)
    for name, factor in (("Red", 1), ("Green", 0), ("Blue", 1)):
        setattr(made, f"{name}PaletteColorLookupTableDescriptor", [4, 0, 16])
        content = (table * factor * 257).astype("<u2").tobytes()
        setattr(made, f"{name}PaletteColorLookupTableData", content)
    assert shown(made)[0, :4].tolist() == [[0, 0, 0], [80, 0, 80], [160, 0, 160], [255, 0, 255]]


# ---- how it is stored ----------------------------------------------------------------------------
def encoded(kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((VALUES // 16).astype(np.uint8)).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_other_byte_orders(shown, syntax):
    made = dataset(syntax=syntax)
    if syntax is ExplicitVRBigEndian:
        made.PixelData = VALUES.astype(">u2").tobytes()
        made["PixelData"].VR = "OW"
    assert (shown(made) == eight_bits(VALUES.astype(float), 0, 4095)).all()


def test_run_lengths(shown):
    made = dataset()
    made.compress(RLELossless, generate_instance_uid=False)
    assert (shown(made) == eight_bits(VALUES.astype(float), 0, 4095)).all()


def test_what_pillow_decodes(shown):
    made = dataset((VALUES // 16).astype(np.uint8), bits=8, syntax=JPEG2000Lossless)
    made.PixelData = encapsulate([encoded("JPEG2000", irreversible=False, no_jp2=True)])
    made["PixelData"].VR = "OB"
    assert (shown(made) == VALUES // 16).all()


def test_jpeg_baseline(shown):
    made = dataset((VALUES // 16).astype(np.uint8), bits=8, syntax=JPEGBaseline8Bit)
    made.PixelData = encapsulate([encoded("JPEG", quality=95)])
    made["PixelData"].VR = "OB"
    assert np.abs(shown(made).astype(int) - VALUES // 16).max() <= 6


def test_one_of_several_frames(shown):
    frames = np.stack([VALUES, VALUES[::-1]])
    found = shown(dataset(frames), "--frame", "2")
    assert (found == eight_bits(VALUES[::-1].astype(float), 0, 4095)).all()


# ---- files that give no picture ------------------------------------------------------------------
def bad_files(folder: Path) -> dict[str, str]:
    """Write one file of each kind -> {name: what is said of it}."""
    save(dataset(None), folder / "none.dcm")
    save(dataset(Modality="CT"), folder / "ct.dcm")
    save(dataset(np.stack([VALUES] * 3)), folder / "cine.dcm")
    (folder / "page.dcm").write_text("<html>")
    (folder / "notes").write_text("no suffix")
    cut = dataset()
    cut.PixelData = cut.PixelData[:100]
    save(cut, folder / "cut.dcm")
    lossless = dataset(syntax=JPEGLosslessSV1)
    lossless.PixelData = encapsulate([b"\xff\xd8" + b"\0" * 100])
    lossless["PixelData"].VR = "OB"
    save(lossless, folder / "lossless.dcm")
    save(dataset(Rows=1, Columns=1200), folder / "strip.dcm")
    whole = save(dataset(), folder / "torn.dcm").read_bytes()
    (folder / "torn.dcm").write_bytes(whole[:200])
    odd = dataset()
    del odd.BitsAllocated
    save(odd, folder / "odd.dcm")
    return {
        "none.dcm": "no pixel data",
        "ct.dcm": "modality CT",
        "cine.dcm": "3 frames: choose one with --frame",
        "page.dcm": "no DICOM file (its header is missing)",
        "cut.dcm": "its pixels cannot be read (",
        "lossless.dcm": "compressed as JPEG Lossless",
        "strip.dcm": "1200 x 1 pixels",
        "torn.dcm": "",
        "odd.dcm": "",
    }


def test_one_bad_file_costs_no_other(tmp_path, capsys):
    folder = tmp_path / "in"
    save(dataset(), folder / "sub" / "good.dcm")
    save(dataset(PatientID="P2"), folder / "IM0001")  # as scanners name them
    bad = bad_files(folder)
    (folder / "picture.png").write_bytes(b"")
    assert main([str(folder), "--output_dir", str(tmp_path / "out")]) == 1
    out = capsys.readouterr().out
    assert out.startswith("converted 2 of 12 files\n")
    for name, said in bad.items():
        assert said in out, name
    # damaged ones are all named, others once for each reason
    for name in ("cut.dcm", "lossless.dcm", "strip.dcm", "odd.dcm"):
        assert f"{folder / name}: " in out
    output = tmp_path / "out"
    made = sorted(path.relative_to(output).as_posix() for path in output.rglob("*.*"))
    assert made == ["IM0001.png", "images.csv", "sub/good.png"]


def test_nothing_to_convert(tmp_path, capsys):
    bad_files(tmp_path / "in" if (tmp_path / "in").mkdir() is None else tmp_path)
    assert main([str(tmp_path / "in"), "--output_dir", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert f"error: {tmp_path / 'in'}: no file gave a picture" in err and "modality CT" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize(
    ("prepare", "flags", "said"),
    [
        (lambda folder: None, [], "no such folder"),
        (lambda folder: folder.mkdir(), [], "no file gave a picture"),
        (lambda folder: folder.with_name("out").mkdir(), [], "exists and nothing is overwritten"),
        (lambda folder: save(dataset(), folder / "a.dcm"), ["--frame", "0"], "counted from 1"),
        (
            lambda folder: save(dataset(), folder / "a.dcm"),
            ["--frame", "2"],
            "no frame 2: it has 1",
        ),
        (
            lambda folder: [save(dataset(), folder / name) for name in ("a", "a.dcm")],
            [],
            "would both become",
        ),
        (
            lambda folder: [save(dataset(), folder / name) for name in ("a.DICOM", "a.dcm")],
            [],
            "would both become",
        ),
    ],
)
def test_refusals(tmp_path, capsys, prepare, flags, said):
    prepare(tmp_path / "in")
    if said == "exists and nothing is overwritten":
        (tmp_path / "in").mkdir()
    assert main([str(tmp_path / "in"), "--output_dir", str(tmp_path / "out"), *flags]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out" / "a.png").exists()


def test_other_modalities_by_flag(shown):
    made = dataset(Modality="CT")
    assert shown(made, "--modality", "CT").shape == (30, 40)


def test_a_window_that_does_not_fit_is_noted(tmp_path, capsys):
    save(dataset(WindowCenter=60_000, WindowWidth=100), tmp_path / "in" / "a.dcm")
    assert main([str(tmp_path / "in"), "--output_dir", str(tmp_path / "out")]) == 0
    assert "note: 1 pictures have nearly one grey value" in capsys.readouterr().out


def test_without_pydicom_one_line_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert main([str(tmp_path), "--output_dir", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"error: {MISSING}\n"


# ---- the table -----------------------------------------------------------------------------------
def test_the_table_goes_on_to_data_table(tmp_path, capsys):
    for number, (sex, age, view) in enumerate(
        (("F", "058Y", "PA"), ("M", "011M", "AP"), ("O", "", ""))
    ):
        tags = {
            "PatientID": f"P{number}",
            "PatientSex": sex,
            "PatientAge": age,
            "ViewPosition": view,
        }
        tags |= {
            "PatientName": "Doe^Jane",
            "AccessionNumber": f"A{number}",
            "StudyDate": "20260102",
        }
        save(dataset(**tags), tmp_path / "in" / f"{number}.dcm")
    assert main([str(tmp_path / "in"), "--output_dir", str(tmp_path / "out")]) == 0
    file = tmp_path / "out" / "images.csv"
    assert "Doe" not in file.read_text()
    rows = list(csv.DictReader(file.open()))
    assert [row["image"] for row in rows] == ["0.png", "1.png", "2.png"]
    assert (
        rows[0]["accession"] == "A0"
        and rows[0]["modality"] == "DX"
        and rows[0]["date"] == "20260102"
    )
    with file.open("w", newline="") as out:  # as a hospital joins its labels
        writer = csv.DictWriter(out, [*rows[0], "Edema"])
        writer.writeheader()
        writer.writerows(row | {"Edema": str(i % 2)} for i, row in enumerate(rows))
    data_file = tmp_path / "out" / "data.jsonl"
    flags = ["--image", "image", "--patient", "patient", "--labels", "Edema", "--sex", "sex"]
    flags += ["--age", "age", "--view", "view", "--dataset", "x", "--output", str(data_file)]
    capsys.readouterr()
    assert data.table.main([str(file), *flags]) == 0
    assert "images are not below" not in capsys.readouterr().out
    examples = read_jsonl(data_file)
    assert [(e.patient_id, e.sex, e.age, e.view) for e in examples] == [
        ("x-P0", "F", 58, "PA"),
        ("x-P1", "M", 0, "AP"),
        ("x-P2", None, None, None),
    ]
