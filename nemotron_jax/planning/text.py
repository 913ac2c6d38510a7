"""Estimates as lines for a terminal."""

from collections.abc import Mapping, Sequence

GB = 1e9


def one(report: Mapping) -> str:
    """A report of one slice."""
    size = {name: value / GB for name, value in report["bytes_per_device"].items()}
    held = ", ".join(
        f"{name} {value:.1f}"
        for name, value in size.items()
        if value >= 0.05 and name not in ("total", "available")
    )
    seconds, constants = report["estimated_step_seconds"], report["constants"]
    verdict = "fits" if report["fits"] else "does not fit"
    rows = {
        "target": f"{report['target']}, {mesh_of(report)}: estimated, nothing compiled",
        "a device": f"{size['total']:.1f} of {size['available']:.0f} GB: {verdict}",
        "of which": f"{held} GB",
        "a step": f"{_time(seconds['total'])}, MFU {report['mfu']:.3f}",
        "of which ": ", ".join(
            f"{name} {_time(seconds[name])}" for name in ("products", "memory", "network")
        )
        + f"; hidden {_time(seconds['network_hidden'])}",
        "into a device": f"{report['link_bytes_per_device'] / GB:,.1f} GB a step over its links",
        **_stage(report),
        "constants": f"{constants['flops'] / 1e12:.0f} TFLOP/s, {constants['hbm'] / 1e12:.3f} TB/s,"
        f" {constants['link'] / 1e9:.0f} GB/s a link, {constants['links']:g} links; dense products "
        f"at {constants['dense_products']:.0%} of peak, kernels "
        f"{'by their static times' if constants['static_kernels'] else 'as on v5p, assumed'}",
    }
    if report["why"]:
        rows["why"] = report["why"]
    return "\n".join(f"{name.strip():20}{value}" for name, value in rows.items())


def many(reports: Sequence[Mapping]) -> str:
    """A table over slices, and which of them fit."""
    decodes = any("decode" in report for report in reports)
    rate = "tokens/s" if decodes else "MFU"
    rows = "rows that fit" if decodes else "rows"
    lines = [("slice", "devices", "mesh", rows, "GB, of", "", "step", rate, "with drafts")]
    for report in reports:
        if "fits" not in report:
            empty = ("",) * 5
            row = (report["target"], str(report["devices"]), *empty, "no row for each", "")
            lines.append(row)
            continue
        size = report["bytes_per_device"]
        figure, drafted, fitting = _decode_cells(report["decode"]) if decodes else ("",) * 3
        lines.append(
            (
                report["target"],
                str(report["devices"]),
                mesh_of(report),
                fitting or f"{report['micro_batches']} x {_rows(report)}",
                f"{size['total'] / GB:.0f} of {size['available'] / GB:.0f}",
                "fits" if report["fits"] else "no",
                _time(report["estimated_step_seconds"]["total"]),
                figure or f"{report['mfu']:.2f}",
                drafted,
            )
        )
    if not any(line[-1] for line in lines[1:]):
        lines = [line[:-1] for line in lines]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = [
        "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([*text, _smallest(reports)])


def _decode_cells(decode: Mapping) -> tuple[str, str, str]:
    """Tokens a second without and with drafts, and the rows that fit."""
    drafts = decode["speculative"]
    drafted = f"{drafts['tokens_per_second']:,.0f}" if drafts else ""
    return f"{decode['tokens_per_second']:,.0f}", drafted, f"{decode['rows_that_fit']:,}"


def mesh_of(report: Mapping) -> str:
    """A mesh without the axes of one device."""
    axes = " × ".join(
        f"{axis.replace('_', ' ')} {size}" for axis, size in report["mesh"].items() if size > 1
    )
    return axes or "one device"


def _rows(report: Mapping) -> int:
    """Rows of a micro-batch on all devices."""
    return report["rows"] // report["micro_batches"]


def _stage(report: Mapping) -> dict[str, str]:
    if "decode" in report:
        decode = report["decode"]
        rows = {
            "decoding": f"{decode['rows']} rows of {decode['context']:,} tokens, experts "
            f"{decode['experts']}: {decode['tokens_per_second']:,.0f} tokens/s, "
            f"{decode['tokens_per_second_user']:,.0f} each",
            "rows that fit": f"{decode['rows_that_fit']:,}",
        }
        if drafts := decode["speculative"]:
            rows["speculative"] = (
                f"{drafts['k']} drafts, {drafts['mean_length']:.2f} tokens a round: "
                f"{drafts['tokens_per_second']:,.0f} tokens/s"
            )
        return rows
    if "grpo" in report:
        parts = report["grpo"]
        return {name: _time(part["seconds"]) for name, part in parts.items()}
    return {
        "rows": f"{report['rows']:,} of {report['sequence_length']:,} tokens in "
        f"{report['micro_batches']} micro-batches, remat {report['remat']}",
        "precision": report["precision"],
    }


def _smallest(reports: Sequence[Mapping]) -> str:
    fitting = [report for report in reports if report.get("fits")]
    if not fitting:
        return "none of these fits"
    least = min(report["devices"] for report in fitting)
    names = [report["target"] for report in fitting if report["devices"] == least]
    return f"fewest devices that fit: {least} ({', '.join(names)})"


def _time(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{1e3 * seconds:.2f} ms"
