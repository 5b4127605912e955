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
	"volumes": {
		"msb --version":                                     goStart,
		"volume ls, none":                                   goStart,
		"volume inspect, of 10000":                          goStart + " Opening the records adds 0.8 ms: SQLite, translated to Go, reads its schema and runs three statements.",
		"volume ls, 10000":                                  listing,
		"volume ls --format json, 10000":                    listing,
		"volume create, warm home (ours durable)":           durable + " " + alsoStart,
		"volume create, cold home (ours durable)":           "a home is made durably: directories, the journal and the database, each synced, before the volume. " + alsoStart,
		"volume create --kind disk, 1 GiB (ours durable)":   durable + " " + alsoStart,
		"volume create --kind disk, 100 GiB (ours durable)": "1.5 MiB in some 70 places of the image, which the host allocates and writes one by one. " + durable,
		"volume rm, empty (ours durable)":                   commitOnly + " " + alsoStart,
		"volume rm, disk of 1 GiB":                          commitOnly + " The helper that deletes the image starts meanwhile. " + alsoStart,
		"volume rm, 10 000 files":                           "the start of the process and of the helper that deletes in the background, and one commit; none of it depends on the files.",
		"image of 100 GiB, allocated":                       "group descriptors, their reserve for 8 times the size, and the superblock's copies.",
		"create dir volume (ours durable)":                  durable,
		"create dir volume, among 10000":                    durable + " " + newInodes,
		"create dir volume, 8 at a time":                    "callers share commits, but each makes four files and directories. " + newInodes + " " + durable,
		"remove empty volume (ours durable)":                commitOnly,
		"remove empty volume, among 10000":                  commitOnly,
		"list 1000 volumes":                                 "a list is read anew from the database, which another process may have changed, and nothing is kept from one list to the next.",
		"get":                                               "it is read anew from the database: 15 system calls are SQLite's locks and its look for a journal.",
		"fs.read 4 KiB":                                     contained,
		"fs.stat":                                           contained,
		"fs.exists":                                         contained,
		"fs.list 10 000 entries":                            contained,
		"fs.write 4 KiB over a file (ours atomic, safe)": "the new content has to be on the disk before it gets the name: the floor is a new file, synced and renamed over the old one with plain calls. " +
			"Two thirds are one fdatasync, for which the disk is waited for three times where ext4 has no journal, as here; with one it is not needed (internal/volumefs/order.go). The peer overwrites in place and syncs nothing.",
		"read stream 256 MiB, own buffer":                    "one copy out of the page cache, at its speed.",
		"read whole 256 MiB":                                 "new memory: each page of the answer is zeroed by the kernel before it is filled.",
		"write stream 256 MiB, 64 KiB chunks (ours durable)": diskSpeed,
		"write stream 256 MiB, 1 MiB chunks (ours durable)":  diskSpeed,
		"write whole 256 MiB (ours durable)":                 diskSpeed,
		"copy 256 MiB (ours durable)":                        diskSpeed,
	},
}

// wakeUps is why rows of small requests are missed on an idle machine.
const wakeUps = "on an idle machine processors halt while they wait for the other side. A wake-up is an interrupt through the hypervisor: sending it costs as much as " +
	"tens of such requests (perf: 28 % of our server's time for lookups), and both servers have to send it whenever the driver sleeps."

// Reasons of several rows of volumes.
const (
	goStart = "the start of the process is nearly all of it (perf, --version). A Go program that prints one line takes two thirds of it; the rest is " +
		"page faults and initialization of what is linked in, of which SQLite and the C library under it are half. Registry client, TLS and zstd, " +
		"which were a third of the start, are a program of their own inside of msb."
	alsoStart = "The start of the process is the other half: see msb --version."
	listing   = "a third of the time is SQLite's (perf), which joins the columns of all rows to one text: reading row by row takes longer. Making the output, " +
		"parsing, memory and the start of the process share the rest."
	durable = "a creation waits for SQLite's commit: three syncs, one after the other; beside the second its name is synced (the doc comment of internal/volstore says why). " +
		"On this disk each takes as long as half of what the peer takes in all; the peer syncs nothing."
	newInodes = "A third of the processors' time is ext4's search for free inodes (perf: recently_deleted): without a journal, as here, it passes over every file that was deleted " +
		"within the last minute, and the rounds delete what they have made."
	commitOnly = "a removal waits for SQLite's commit: three syncs, one after the other. On this disk each takes as long as a third of what the peer takes in all; the peer syncs nothing."
	contained  = "what plain calls do not do: resolve inside of the volume only, look for a stand-in's attribute, read the time of birth, " +
		"and ask whether the volume was removed meanwhile: a system call each."
	diskSpeed = "the data has to reach the disk before the file gets its name: nearly all of the time is the disk's, for plain calls that do the same (the floor), too. The peer's time is that of the page cache."
)
