package main

// reasons say why a row misses its bound, by benchmark and row. A row that is
// not missed any more is not shown: its reason may stay until the cause is gone.
var reasons = map[string]map[string]string{
	"virtiofs": {
		"create+unlink d8":                     "the rounds of both servers are spread wider than their distance; no cause in the server is known.",
		"readdirplus 10k known, 4K replies":    "the time is the kernel's lookup and stat of each entry, with cold caches on this machine; not mended yet.",
		"readdirplus 10k known, 128K replies":  "as for 4K replies; the best round meets it, rounded.",
		"getattr d1":                           wakeUps,
		"getattr d64":                          wakeUps,
		"lookup known d64":                     wakeUps,
		"kicks per getattr d1":                 wakeUps,
		"allocations per request, read 4K d64": "reads of pages that are not cached are handed to a worker; the cause of this rest has not been looked for.",
	},
	"boot": {
		"plain sandbox": "emulation translates every piece of code that runs once. The agent alone, without supervisor and confinement, " +
			"is most of the way: 60 ms until its Go runtime reaches main, 40 ms from there to ready, 20 ms for signal handlers and the " +
			"loopback before the first program. Start of the supervisor, lookup of the kernel and confinement of QEMU add 35 ms. " +
			"Guests that sleep and wake, as ours do and the bare init does not, lose more to whatever else runs on the machine.",
		"image, ext4 volume, virtiofs volume": "as for the plain sandbox; beyond that the first program is dynamically linked and comes from a cold overlay (80 ms more), " +
			"and three file systems are mounted by code that runs once.",
		"image and virtiofs volume": "the confined file server starts beside QEMU, but shares the processors with it; one more device costs the guest 10 to 30 ms.",
	},
}

// wakeUps is why rows of small requests are missed on an idle machine.
const wakeUps = "on an idle machine the processors halt between batches: nearly every request is kicked, and each wake-up is an interrupt through the hypervisor. " +
	"Signalling earlier within a batch is to be tried."
