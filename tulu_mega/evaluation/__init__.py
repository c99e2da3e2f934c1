"""How good a checkpoint is: public benchmarks asked through vLLM, judged, and given with intervals."""
