"""Controller: a feedback on the sparsity that soft thresholds have reached."""

__all__ = ["pi_step"]


def pi_step(
    trim: float, average: float | None, wanted: float, measured: float
) -> tuple[float, float]:
    r"""One step of a PI controller on a correction to the common log-threshold.

    With the error :math:`e` and its moving average :math:`\xi`, the correction changes by
    :math:`0.3\, e + 2\, (\xi_t - \xi_{t-1})`, at most by 0.1.

    Sohrabi et al., "On PI controllers for updating Lagrange multipliers in constrained
    optimization", ICML 2024.

    Args:
        trim: The correction.
        average: The moving average of the error; None at first.
        wanted: The sparsity that is due.
        measured: The sparsity of the model.

    Returns:
        The next correction, and the next moving average.

    Example:
        >>> pi_step(-2.0, None, wanted=0.5, measured=0.4)
        (-1.97, 0.09999999999999998)
    """
    error = wanted - measured
    latest = error if average is None else 0.8 * average + 0.2 * error
    change = 0.3 * error + 2.0 * (latest - (latest if average is None else average))
    return trim + max(-0.1, min(0.1, change)), latest
