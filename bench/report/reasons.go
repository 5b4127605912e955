package main

// reasons say why a row misses its bound, by benchmark and row. A row that is
// not missed any more is not shown: its reason may stay until the cause is gone.
var reasons = map[string]map[string]string{
	"virtiofs": {
		"create+unlink d8":                  "the rounds of both servers are spread wider than their distance; no cause in the server is known.",
		"readdirplus 10k known, 4K replies": "420 replies, one at a time: on an idle machine each is two wake-ups of a halted processor, which cost both servers the same and more than the entries do (the row with 128K replies has 16).",
		"getattr d1":                        wakeUps,
		"getattr d64":                       wakeUps,
		"lookup known d64":                  wakeUps,
		"kicks per getattr d1":              wakeUps,
	},
	"boot": {
		"plain sandbox": "emulation translates every piece of code that runs once. The agent alone, without supervisor and confinement, " +
			"is most of the way: 60 ms until its Go runtime reaches main, 40 ms from there to ready, 20 ms for signal handlers and the " +
			"loopback before the first program. Start of the supervisor, lookup of the kernel and confinement of QEMU add 30 ms. " +
			"Guests that sleep and wake, as ours do and the bare init does not, lose more to whatever else runs on the machine.",
		"image, ext4 volume, virtiofs volume": "as for the plain sandbox; beyond that the first program is dynamically linked and comes from a cold overlay (80 ms more), " +
			"and three file systems are mounted by code that runs once.",
		"image and virtiofs volume": "the confined file server starts beside QEMU, but shares the processors with it; one more device costs the guest 10 to 30 ms.",
	},
}

// wakeUps is why rows of small requests are missed on an idle machine.
const wakeUps = "on an idle machine processors halt while they wait for the other side. A wake-up is an interrupt through the hypervisor: sending it costs as much as " +
	"tens of such requests (perf: 28 % of our server's time for lookups), and both servers have to send it whenever the driver sleeps."
