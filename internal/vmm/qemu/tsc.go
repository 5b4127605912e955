package qemu

import (
	"runtime"
	"sort"
	"time"

	"golang.org/x/sys/unix"
)

// tscSample is how long one comparison of the two clocks takes.
const tscSample = 7 * time.Millisecond

// TSCKHz measures the frequency of the host's time stamp counter against
// CLOCK_MONOTONIC_RAW: under TCG a guest reads the host's counter, and a microvm
// has no other clock to calibrate it with. The median of three samples is kept
// for this boot of the host in dir; 0 where there is no counter.
func TSCKHz(dir string) (int, error) {
	if !hasTSC {
		return 0, nil
	}
	cache := bootCache{dir: dir, name: "tsc-khz"}
	var khz int
	if cache.load(&khz) && khz > 0 {
		return khz, nil
	}
	samples := make([]int, 0, 3)
	for range cap(samples) {
		k, err := sampleTSC()
		if err != nil {
			return 0, err
		}
		samples = append(samples, k)
	}
	sort.Ints(samples)
	cache.store(samples[1])
	return samples[1], nil
}

func sampleTSC() (int, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	t0, c0, err := clocks()
	if err != nil {
		return 0, err
	}
	time.Sleep(tscSample)
	t1, c1, err := clocks()
	if err != nil {
		return 0, err
	}
	return int(float64(c1-c0) / float64(t1-t0) * 1e6), nil
}

// clocks reads both clocks as close together as it can: of some tries the one
// during which the fewest ticks passed.
func clocks() (ns int64, ticks uint64, err error) {
	best := ^uint64(0)
	for range 8 {
		var ts unix.Timespec
		a := rdtsc()
		if err := unix.ClockGettime(unix.CLOCK_MONOTONIC_RAW, &ts); err != nil {
			return 0, 0, err
		}
		if b := rdtsc(); b-a < best {
			best, ns, ticks = b-a, ts.Nano(), a+(b-a)/2
		}
	}
	return ns, ticks, nil
}
