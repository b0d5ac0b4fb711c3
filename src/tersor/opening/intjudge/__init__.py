"""IntJudge: a judge of interleaved answers that is trained on battles, and says how far it can be trusted."""
