"""OpenING: open-ended answers in text and pictures, compared in pairs, down to a ranking with its intervals.

The commands of `tersor opening` in Python: instances and answers (`write_data`, `write_output`, `Store`), battles
(`roaming`), judges (`run_judge`), and what takes plain lists of `Verdict`: `tallies`, `fit_strengths`,
`agreement_table` and `compare_models`.
"""

from tersor._lazy import members

_HOMES = {
    "Answer": "tersor.opening.outputs",
    "Battle": "tersor.opening.records",
    "Comparison": "tersor.opening.compare",
    "Instance": "tersor.opening.records",
    "Step": "tersor.opening.records",
    "Store": "tersor.opening.store",
    "Verdict": "tersor.opening.records",
    "agreement_table": "tersor.opening.agreement",
    "compare_models": "tersor.opening.compare",
    "fit_strengths": "tersor.opening.fits",
    "generate_all": "tersor.opening.generators.base",
    "matched": "tersor.opening.agreement",
    "model_folder": "tersor.opening.outputs",
    "read_data": "tersor.opening.data",
    "read_verdicts": "tersor.opening.official",
    "roaming": "tersor.opening.sampling",
    "run_judge": "tersor.opening.judging.runner",
    "summarize": "tersor.opening.summary",
    "tallies": "tersor.opening.ranking",
    "write_data": "tersor.opening.data",
    "write_output": "tersor.opening.outputs",
}
__all__ = sorted(_HOMES)

__getattr__, __dir__ = members(__name__, _HOMES)
