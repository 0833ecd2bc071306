"""What an objective did to a model: the distribution over tokens, samples on benchmarks, and the report on both."""
