"""A suite's report as JUnit XML, which CI systems show: a test case for each section."""

from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:  # it loads torch
    from p2pmodel.node.versions.testing import SuiteReport


def junit(report: "SuiteReport") -> bytes:
    """UTF-8, by the schema that Jenkins and others read (`testsuites`, `testsuite`, `testcase`, `failure`)."""
    counts = {"tests": str(len(report.sections)), "failures": str(len(report.regressions)), "errors": "0"}
    seconds = f"{report.seconds:.3f}"
    root = ElementTree.Element("testsuites", counts | {"time": seconds})
    suite = ElementTree.SubElement(root, "testsuite", {"name": report.suite or "exam", **counts, "time": seconds})
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in (("subject", report.what), ("parent", report.parent), ("digest", report.digest)):
        ElementTree.SubElement(properties, "property", {"name": name, "value": _allowed(value)})
    for result in report.sections:
        share = result.cases / report.cases if report.cases else 0.0
        case = ElementTree.SubElement(
            suite,
            "testcase",
            {"classname": report.suite or "exam", "name": result.section, "time": f"{report.seconds * share:.3f}"},
        )
        scores = _allowed(f"{report.parent}: {result.parent:.6f}, {report.what}: {result.score:.6f}")
        if result.regression:
            failure = ElementTree.SubElement(case, "failure", {"type": "regression", "message": result.regression})
            failure.text = scores
        ElementTree.SubElement(case, "system-out").text = scores
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))


def _allowed(text: str) -> str:
    """Without the control characters that XML cannot hold."""
    return "".join(character for character in text if character >= " ")
