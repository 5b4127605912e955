package volstore

import (
	"strings"
	"sync"
	"testing"

	"github.com/microsandbox-go/microsandbox/internal/failpoint"
)

// TestKilledAtEveryPoint kills each operation at each declared point of this
// package that it reaches, and demands that the next commands find the home as
// if nothing, or everything, had happened, also with strangers at the names. A
// point that nothing reaches fails the test. An injected error instead of the
// kill must do no more harm.
func TestKilledAtEveryPoint(t *testing.T) {
	var mu sync.Mutex
	reached := map[string]bool{}
	points := []string{"records.begun"}
	for _, p := range failpoint.Names() {
		if strings.HasPrefix(p, "volstore.") {
			points = append(points, p)
		}
	}
	t.Run("all", func(t *testing.T) {
		for _, sc := range scenarios() {
			t.Run(sc.name, func(t *testing.T) {
				t.Parallel()
				if sc.disk {
					needMkfs(t)
				}
				for _, point := range points {
					if !killAt(t, sc, point, intrusions[0], firsts[0]) {
						continue
					}
					mu.Lock()
					reached[point] = true
					mu.Unlock()
					for _, in := range intrusions {
						for _, f := range firsts {
							killAt(t, sc, point, in, f)
						}
					}
					failAt(t, sc, point)
				}
			})
		}
	})
	for _, p := range points {
		if !reached[p] {
			t.Errorf("no operation reaches %s", p)
		}
	}
}

// killAt runs the scenario's operation with a kill at a point, then the
// intrusion, the first command and the check; it reports whether the point was
// reached.
func killAt(t testing.TB, sc scenario, point string, in intrusion, f first) (hit bool) {
	t.Helper()
	h := sc.prepared(t)
	defer discard(h)
	if err := child(h, sc.op, point+"=kill").Run(); err == nil || err.Error() != "signal: killed" {
		return false
	}
	strangers := in.place(t, h)
	aftermath{in, f, strangers}.check(t, sc, h, sc.op+", killed at "+point)
	return true
}

func failAt(t testing.TB, sc scenario, point string) {
	t.Helper()
	h := sc.prepared(t)
	defer discard(h)
	_ = child(h, sc.op, point+"=error").Run()
	aftermath{first: firsts[0]}.check(t, sc, h, sc.op+", error at "+point)
}
