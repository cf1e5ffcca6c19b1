"""A few texts of several languages and lengths, to compare embeddings on."""

SAMPLE = (
    "What causes high blood pressure?",
    "Vaccines train the immune system to recognise a pathogen before it is met.",
    "zinc",
    "Die Hauptstadt von Frankreich ist Paris; 東京は日本の首都です。",
    "A long document. " * 60,
)
