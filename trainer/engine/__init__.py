"""DeepSpeed's engine: model under ZeRO, optimizer, moving average, the state that ZeRO left on each rank."""
