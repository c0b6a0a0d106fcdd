"""fxzero: ZeRO-3 training whose every communication is scheduled at compile time."""
