"""Baseline that classifies requests by their words only."""

from bfpo.testbed.language import TEMPLATES, Request


def bag_of_words(train: list[Request], test: list[Request]) -> dict[str, float]:
    """Return how well a logistic regression on words classifies requests as harmful.

    Returns:
        Accuracy and balanced accuracy on the test requests.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, balanced_accuracy_score
    from sklearn.pipeline import make_pipeline

    def texts(requests: list[Request]) -> list[str]:
        return [request.format_prompt(TEMPLATES[0]) for request in requests]

    model = make_pipeline(CountVectorizer(), LogisticRegression(max_iter=1000))
    model.fit(texts(train), [request.is_harmful for request in train])
    predicted, labels = model.predict(texts(test)), [request.is_harmful for request in test]
    return {
        "accuracy": round(float(accuracy_score(labels, predicted)), 3),
        "balanced_accuracy": round(float(balanced_accuracy_score(labels, predicted)), 3),
    }
