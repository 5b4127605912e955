package confine

func capabilityNumber(string) (int, bool) { return 0, true }
func filterFor(Filter) []byte             { return nil }
