"""python tests/cases/advantage_noise.py: advantages of groups whose rewards are almost equal, missing or infinite."""

from tulu_mega.objectives.advantages import ESTIMATORS

GROUPS = ([0.1 + 0.2, 0.3], [1e8, 1e8 + 1], [5.0] * 3, [None, 1.0], [None, None], [1.0, 0, 0, 0], [float("inf"), 1.0])


def main() -> None:
    for rewards in GROUPS:
        for name, estimator in ESTIMATORS.items():
            found = estimator(rewards, [False] * len(rewards))
            shown = tuple(round(value, 6) if abs(value) > 1e-6 else value for value in found.advantages)
            print(rewards, name, shown, found.informative)


if __name__ == "__main__":
    main()
