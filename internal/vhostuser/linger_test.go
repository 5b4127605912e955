package vhostuser

import "testing"

func TestLingerAfterBatch(t *testing.T) {
	for taken, want := range map[int]bool{0: false, 1: false, lingerLeast - 1: false, lingerLeast: true, 4096: true} {
		l := linger{taken: taken}
		if got := l.begin(); got != want {
			t.Errorf("after %d requests: %t, want %t", taken, got, want)
		}
		if l.begin() {
			t.Errorf("after %d requests: again without another", taken)
		}
	}
}

// TestLingerGivesUp: attempts that fail become rare, one that succeeds makes
// them frequent again.
func TestLingerGivesUp(t *testing.T) {
	var l linger
	attempts := func(sleeps int, came bool) (n int) {
		for range sleeps {
			l.taken = 64
			if l.begin() {
				n++
				l.ended(came)
			}
		}
		return n
	}
	if n := attempts(10000, false); n < 30 || n > 60 {
		t.Errorf("%d attempts in 10000 sleeps while all fail", n)
	}
	attempts(lingerSkips+1, true)
	if n := attempts(100, true); n != 100 {
		t.Errorf("%d attempts in 100 sleeps while all succeed", n)
	}
}
