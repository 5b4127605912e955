package conformance

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

const (
	appendName = "appends"
	appendMax  = 9000 // bytes of a record: up to four pages of a file
)

// recordSizes returns how long the records of a party are.
func recordSizes(party, records int) []int {
	rng := rand.New(rand.NewPCG(10, uint64(party)))
	sizes := make([]int, records)
	for i := range sizes {
		sizes[i] = 1 + rng.IntN(appendMax)
		if i%2 == 0 {
			sizes[i] = 1 + rng.IntN(100) // as lines of a log
		}
	}
	return sizes
}

// alphabets tell parties apart; byte i of all that a party appends is letter
// i modulo the length of its alphabet, so that every lost, doubled or misplaced
// byte shows.
var alphabets = []string{"abcdefghijklmnopqrstuvw", "ABCDEFGHIJKLMNOPQRSTUVW", "0123456789"}

func stream(party, from, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = alphabets[party][(from+i)%len(alphabets[party])]
	}
	return b
}

// PrepareAppends makes what parties append to.
func PrepareAppends(dir string, parties int) error {
	err := os.WriteFile(filepath.Join(dir, appendName), nil, 0o600)
	for i := range parties {
		err = errors.Join(err, os.WriteFile(filepath.Join(dir, fmt.Sprintf("appender.%d", i)), []byte(number(0)), 0o600))
	}
	return err
}

// Append appends records to one file at the same time as the other parties do.
// When all have, a descriptor that was open and read from the begin must show
// within the bound what is there.
func (p *Party) Append(records int) error {
	f, err := os.OpenFile(filepath.Join(p.Dir, appendName), os.O_RDWR|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := p.together(1); err != nil {
		return err
	}
	at := 0
	for i, size := range recordSizes(p.Me, records) {
		if n, err := f.Write(stream(p.Me, at, size)); err != nil || n != size {
			return fmt.Errorf("record %d: %d of %d bytes, %w", i, n, size, err)
		}
		at += size
		if i%4 == 3 { // so that the page cache holds the place of the next one
			if _, err := readWhole(f); err != nil {
				return err
			}
		}
	}
	if err := p.together(2); err != nil {
		return err
	}
	return p.settle(f)
}

// together returns when all parties have come to this point.
func (p *Party) together(point int) error {
	if err := p.say(fmt.Sprintf("appender.%d", p.Me), point); err != nil {
		return err
	}
	return p.awaitAll("appender", point)
}

// settle waits, no longer than the bound, until f shows what is there.
func (p *Party) settle(f *os.File) error {
	want, err := os.ReadFile(filepath.Join(p.Exact, appendName))
	if err != nil {
		return err
	}
	late := p.Bound == 0
	for since := time.Now(); ; time.Sleep(time.Millisecond) {
		began := time.Since(since)
		got, err := readWhole(f)
		if err != nil || bytes.Equal(got, want) {
			return err
		}
		if began >= p.Bound && late {
			return fmt.Errorf("a read begun %v after the last append gives %d bytes that differ from the %d there", began, len(got), len(want))
		}
		late = began >= p.Bound // once it may be: see Party.look
	}
}

func readWhole(f *os.File) ([]byte, error) {
	return io.ReadAll(io.NewSectionReader(f, 0, 1<<40))
}

// CheckAppends looks for every byte that the parties appended, in order. It
// returns how many records have bytes of another party within.
func CheckAppends(dir string, parties, records int) (torn int, err error) {
	content, err := os.ReadFile(filepath.Join(dir, appendName))
	if err != nil {
		return 0, err
	}
	at, ends := make([]int, parties), make([]map[int]bool, parties)
	for party := range parties {
		ends[party] = map[int]bool{0: true}
		sum := 0
		for _, size := range recordSizes(party, records) {
			sum += size
			ends[party][sum] = true
		}
	}
	last := 0
	for off, b := range content {
		party := slices.IndexFunc(alphabets, func(a string) bool { return strings.IndexByte(a, b) >= 0 })
		if party < 0 || party >= parties {
			return torn, fmt.Errorf("byte %d is %q, which nobody wrote", off, b)
		}
		if want := stream(party, at[party], 1)[0]; b != want {
			return torn, fmt.Errorf("byte %d is %q, the next one of party %d is %q", off, b, party, want)
		}
		if party != last && !ends[last][at[last]] {
			torn++
		}
		at[party]++
		last = party
	}
	for party := range parties {
		want := 0
		for _, size := range recordSizes(party, records) {
			want += size
		}
		if at[party] != want {
			return torn, fmt.Errorf("%d bytes of party %d, which appended %d", at[party], party, want)
		}
	}
	return torn, nil
}
