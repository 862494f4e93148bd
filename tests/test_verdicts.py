"""The whole way: every known-bad model ends suspect or void under `bench run`, every honest one credible."""

import broken_models as zoo
import pytest

from bench import pipeline, registry
from bench.errors import VoidRun
from bench.finding import verdict
from bench.record import read_void
from bench.session import prepare


def come_to(name, folder, monkeypatch, protocol="quick", samples=100):
    """The verdict on a specimen, and the codes of what warns or blocks."""
    specimen = zoo.ZOO[name]
    monkeypatch.setattr(registry, "_registered", {**registry._registered})
    registry.register("specimen")(lambda data: specimen.build())
    session = prepare("specimen", "digits", protocol, samples=samples, results=folder, quiet=True, insist=True)
    try:
        (record,) = pipeline.run_session(session)
        findings = record.findings
        assert record.audited.share <= 0.15, record.audited
    except VoidRun as error:
        (file,) = folder.rglob("void.json")
        findings = read_void(file.parent).findings
        assert error.code == findings[0].code and error.exit_code == 2
    return verdict(findings), {finding.code for finding in findings if finding.severity != "informs"}
