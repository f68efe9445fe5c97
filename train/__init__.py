"""The programs that make training data and train: run.py, mine.py, score.py."""
