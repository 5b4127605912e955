package volstore

import (
	"cmp"
	"math/rand/v2"
	"os"
	"runtime"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/storetest"
)

// TestKilledAnywhere kills operations before random system calls, kills half of
// the next operations too, with every kind of intruder, and demands what the
// sweep demands. MSB_SOAK_KILLS sets the number of kills, MSB_SOAK_SEED repeats
// a run.
func TestKilledAnywhere(t *testing.T) {
	needMkfs(t)
	want := number(t, "MSB_SOAK_KILLS", 300)
	seed := uint64(number(t, "MSB_SOAK_SEED", int(time.Now().UnixNano())))
	start := time.Now()
	var kills, findings, round atomic.Int64
	t.Run("all", func(t *testing.T) {
		for range runtime.GOMAXPROCS(0) {
			t.Run("worker", func(t *testing.T) {
				t.Parallel()
				calls := map[string]int{}
				for kills.Load() < int64(want) {
					r := rand.New(rand.NewPCG(seed, uint64(round.Add(1))))
					kills.Add(anywhere(&counting{t, &findings}, r, calls))
				}
			})
		}
	})
	t.Logf("soak: part=kills kills=%d findings=%d seconds=%.0f seed=%d", kills.Load(), findings.Load(), time.Since(start).Seconds(), seed)
}

// number reads a number from the environment.
func number(t testing.TB, variable string, otherwise int) int {
	n, err := strconv.Atoi(cmp.Or(os.Getenv(variable), strconv.Itoa(otherwise)))
	if err != nil {
		t.Fatalf("%s: %v", variable, err)
	}
	return n
}

// counting counts the errors of a test.
type counting struct {
	testing.TB
	findings *atomic.Int64
}

func (c *counting) Errorf(format string, args ...any) {
	c.Helper()
	c.findings.Add(1)
	c.TB.Errorf(format, args...)
}

// seconds are operations that meet what a killed one left, and may be killed too.
var seconds = []string{
	"create a", "create b", "create other", "remove a", "remove b", "rename a b", "rename b a", "label a", "prune k v", "repair",
}

// anywhere kills one operation, or two in a row, at random and checks what is
// left. calls learns how many system calls an operation makes. It returns the
// number of kills.
func anywhere(t testing.TB, r *rand.Rand, calls map[string]int) (kills int64) {
	t.Helper()
	all := scenarios()
	sc := all[r.IntN(len(all))]
	h := sc.prepared(t)
	defer discard(h)
	a := aftermath{intrusion: intrusions[r.IntN(len(intrusions))], first: firsts[r.IntN(len(firsts))]}
	what := sc.name + ": "
	kill := func(op string) {
		n := 1 + r.IntN(cmp.Or(calls[op], 100))
		if storetest.KillAt(t, child(h, op, ""), n) {
			kills++
			what += op + " killed before call " + strconv.Itoa(n) + ", "
		} else {
			calls[op] = max(n-1, 10)
			what += op + ", "
		}
	}
	kill(sc.op)
	a.strangers = a.place(t, h)
	if r.IntN(2) == 0 {
		kill(seconds[r.IntN(len(seconds))])
	}
	a.check(t, sc, h, what)
	return kills
}
