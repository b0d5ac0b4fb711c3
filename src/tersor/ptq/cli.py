"""`tersor quantize`."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor._console import spinner
from tersor._errors import TersorError
from tersor._images import image_files

if TYPE_CHECKING:
    from torch import nn

    from tersor.bench.measure import Estimate
    from tersor.ptq.images import Preprocessing
    from tersor.ptq.onnx_export import OnnxFile


def quantize(
    model: Annotated[
        str, typer.Option(help="A model of timm such as 'repvgg_a0', or 'tiny-repvgg', 'tiny-mobileone'.")
    ],
    calibration: Annotated[Path, typer.Option(help="Folder of images like those to come; no classes needed.")],
    out: Annotated[Path, typer.Option(help="The .onnx file; a report of the same name ends in .html.")],
    weights: Annotated[
        Path | None, typer.Option(help="Weights of a timm model in training form: .safetensors, .pth or .pt.")
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(min=1, help="Classes of a timm model's head; as many as its weights have by default.")
    ] = None,
    bits: Annotated[
        str, typer.Option(help="Of weights and activations: w8a8, w6a6, w4a8, w4a4 and the like.")
    ] = "w8a8",
    evaluation: Annotated[
        Path | None, typer.Option(help="Folder with a folder of images for each class, for accuracies.")
    ] = None,
    images: Annotated[int, typer.Option(help="Calibration images, drawn from the folder.")] = 256,
    iterations: Annotated[int, typer.Option(help="Iterations a block.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the images and their order.")] = 0,
    keep_float: Annotated[
        list[str] | None,
        typer.Option(
            help="Stages to leave in floating point; several times. 'auto': those that are faster so; 'none'."
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Layer to leave in floating point, or a pattern; several times.")
    ] = None,
    symmetric: Annotated[
        bool, typer.Option("--symmetric", help="Activations as int8 with zero points 0, as TensorRT takes them.")
    ] = False,
    reduce_range: Annotated[
        bool, typer.Option("--reduce-range", help="Weights of 7 bits, for processors without VNNI.")
    ] = False,
    opset: Annotated[int, typer.Option(help="ONNX operator set of the file, from 18 to 23.")] = 21,
    free_size: Annotated[bool, typer.Option("--free-size", help="Leave height and width free in the file.")] = False,
    uint8_input: Annotated[
        bool, typer.Option("--uint8-input", help="The file takes uint8 pictures and normalizes them itself.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Quantize a network of parallel branches to an ONNX file of integers, with a report of what it costs.

    An interrupted run goes on after its last stage when it is started again.

    Example: tersor quantize --model repvgg_a0 --weights a0.safetensors --calibration photos/ --out a0_int8.onnx
    """
    from tersor.ptq.config import RepAPQConfig

    kept_float = None if keep_float in (None, ["auto"]) else () if keep_float == ["none"] else tuple(keep_float or ())
    settings = {"symmetric": symmetric, "reduce_range": reduce_range, "ignored": tuple(ignore or ())}
    settings["keep_float"] = kept_float
    config = RepAPQConfig.of(bits, iterations=iterations, seed=seed, **settings)
    if max(config.weight_bits, config.activation_bits) > 8:
        raise TersorError(f"--bits {bits}: an ONNX file of integers takes 8 bits or fewer")
    if out.suffix != ".onnx" or out.is_dir():
        raise TersorError(f"--out {out} must be a file that ends in .onnx")
    if images < 1:
        raise TersorError(f"--images {images} must be at least 1")
    from tersor.ptq.images import find_classes, read_folder
    from tersor.ptq.onnx_export import Target

    plain_target = Target(opset=opset)

    image_files(calibration)
    network, preprocessing = _network(model, weights, num_classes)
    remarks: list[str] = []
    given = read_folder(calibration, preprocessing, count=images, seed=seed, tell=remarks.append)
    for remark in remarks:
        typer.echo(remark, err=True)
    labelled = None if evaluation is None else find_classes(evaluation, _classes(network, given))
    from tersor.bench.report import write_report
    from tersor.ptq import calibration as calibrating
    from tersor.ptq.onnx_export import export_float, export_quantized
    from tersor.ptq.report import (
        FLOAT,
        OURS,
        PLAIN,
        batches,
        compare_files,
        file_records,
        report_section,
        speed_record,
    )
    from tersor.ptq.speed import fast_enough, speedup, time_files

    kept = out.with_name(out.name + ".stages")
    with spinner() as status, tempfile.TemporaryDirectory() as folder:

        def on_progress(text: str) -> None:
            status.update(text)
            typer.echo(text, err=True)

        found = calibrating.quantize(network, given, config, folder=kept, on_progress=on_progress)
        status.update("writing the file, and two to compare with")
        files = {FLOAT: export_float(found.merged, given, Path(folder) / "float.onnx")}

        def write(what: calibrating.Quantized) -> OnnxFile:
            return export_quantized(what.model, given, Path(folder) / "ours.onnx", plain_target)

        # How fast int8 with zero points 0 are on this processor says nothing of where they are for.
        if keep_float in (None, ["auto"]) and not symmetric:
            found, files[OURS], stay, speed = fast_enough(found, files[FLOAT], write, given, config)
        else:
            stay = list(found.plan.kept)
            files[OURS] = write(found)
            speed = speedup(time_files(files[FLOAT], files[OURS], given[:1]))
        plain = calibrating.quantize(network, given, config.without_training("minmax"))
        files[PLAIN] = export_quantized(plain.model, given, Path(folder) / "plain.onnx")
        status.update("comparing")
        compared = compare_files(files, given if labelled is None else batches(labelled, preprocessing))
        normalize = (preprocessing.mean, preprocessing.deviation) if uint8_input else None
        target = Target(opset=opset, free_size=free_size, normalize=normalize)
        export = export_float if found.model is found.merged else export_quantized
        files[OURS] = export(found.model, given, out, target)
    records = [*file_records(model, bits, compared, seed), speed_record(model, bits, speed, seed)]
    source = "the calibration" if evaluation is None else "the evaluation folder"
    page = out.with_suffix(".html")
    write_report(page, records, [report_section(config, found.blocks, compared, source)])
    shutil.rmtree(kept)
    facts: dict[str, Any] = {
        "out": str(out), "report": str(page), "bytes": files[OURS].nbytes, "simulation": files[OURS].simulation,
        "share_of_float": files[OURS].nbytes / files[FLOAT].nbytes, "float_layers": files[OURS].float_layers,
        "speed": speed.value, "kept_in_float": stay, "left_in_float": list(found.plan.left),
        "records": [json.loads(record.to_json()) for record in records],
        "blocks": [asdict(block) for block in found.blocks], "remarks": remarks,
    }  # fmt: skip
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for record in records[:-2]:
        typer.echo(
            f"{record.quantity}: {100 * (record.measured or 0):.1f} % [{100 * (record.low or 0):.1f}, "
            f"{100 * (record.high or 0):.1f}]; floating point {100 * (record.baseline or 0):.1f} %, "
            f"{PLAIN} {100 * float(record.peer or 0):.1f} %"
        )
    typer.echo(f"{out}: {facts['bytes']:,} bytes, {facts['share_of_float']:.1%} of floating point; report: {page}")
    for line in _speed_lines(speed, files[OURS], stay, whole=found.model is found.merged):
        typer.echo(line)
    if files[OURS].simulation:
        typer.echo("fewer than 8 bits are simulated: the file gives their numbers, at no gain over 8 bits")


def _speed_lines(speed: Estimate, file: OnnxFile, stay: list[str], *, whole: bool) -> list[str]:
    """What the terminal says about time, and why; ``whole``: all of the network stays in floating point."""
    if whole:
        return [
            "no stage is clearly faster in integers here, so that the file is the network in floating point; "
            "--keep-float none writes integers all the same"
        ]
    lines = [
        f"speed here: {speed.value:.2f} times floating point [{speed.low:.2f}, {speed.high:.2f}], processor time of an "
        f"image on one thread, in turns; {file.float_layers} layers run in floating point"
    ]
    if stay:
        lines.append(f"stages in floating point, where integers are not faster here: {', '.join(stay)} (--keep-float)")
    if speed.high < 1 and not file.simulation and not stay:
        lines.append(
            "slower than floating point: values go to integers and back around what has no integer kernel; "
            "--keep-float STAGE leaves a stage as it is"
        )
    return lines


def _network(model: str, weights: Path | None, classes: int | None) -> tuple[nn.Module, Preprocessing]:
    """Network and preprocessing; a model of the zoo brings its weights along."""
    from tersor import zoo
    from tersor.ptq.images import Preprocessing, load_timm

    if model in zoo.names():
        for option, value in (("weights", weights), ("num-classes", classes)):
            if value is not None:
                raise TersorError(f"--{option} is for models of timm; {model} brings its own")
        net = zoo.load_network(model)
        shape = net.config
        return net, Preprocessing(size=shape.image_size, mean=(shape.mean,) * 3, deviation=(shape.deviation,) * 3)
    if weights is None:
        raise TersorError(f"--model {model} needs --weights FILE, a checkpoint in training form")
    return load_timm(model, weights, classes)


def _classes(network: nn.Module, images: Any) -> int:
    import torch

    with torch.no_grad():
        return int(network(images[:1]).shape[1])
