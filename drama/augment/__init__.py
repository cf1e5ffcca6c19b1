"""Training data out of raw text: crops, queries, reranking, triplets, and mined negatives."""
