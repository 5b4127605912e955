package main

// reasons say why a row misses its bound, by benchmark and row. A row that is
// not missed any more is not shown: its reason may stay until the cause is gone.
var reasons = map[string]map[string]string{
	"virtiofs": {},
	"boot":     {},
}
