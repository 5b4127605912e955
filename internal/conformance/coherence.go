package conformance

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// MaxRounds is how many rounds an exchange can have.
const MaxRounds = 60

// partyPatience bounds waiting for another party, which may be a slow guest.
const partyPatience = 60 * time.Second

// A Party is one of several, in guests and on the host, that change one
// directory in turn and look at what the others changed.
type Party struct {
	Me, Parties int
	Dir         string // the directory, through the mount that is judged
	Exact       string // the same directory, through one that always shows what is there
	// Bound is for how long a change may stay unseen; 0: not at all.
	Bound time.Duration
	// Host is the party that works on the host's directory itself, -1 if there
	// is none. What a guest keeps in a stat overlay is not exchanged with it.
	Host int
}

// Staleness is how long one property showed an old value.
type Staleness struct {
	Property string
	Reads    int
	Old      int           // reads that gave an old value
	Longest  time.Duration // from when the change was surely made to when the last such read began
}

// String is the figures of one property.
func (s Staleness) String() string {
	return fmt.Sprintf("%-22s %5d of %5d reads old, longest %v", s.Property, s.Old, s.Reads, s.Longest.Round(time.Millisecond))
}

// PrepareExchange makes what parties exchange. The host calls it once.
func PrepareExchange(dir string) error {
	files := map[string]string{
		"turn": number(0), "data": number(0), "size": "", "open": "", "short": strings.Repeat("x", 1<<16),
		"mode": "", "mtime": "", "move.0": "", "replaced": number(0), "appended": number(0),
	}
	for i := range 8 {
		files[fmt.Sprintf("seen.%d", i)], files[fmt.Sprintf("ready.%d", i)] = number(0), number(0)
	}
	for i := range MaxRounds + 2 {
		files[fmt.Sprintf("gone.%d", i)] = ""
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			return err
		}
	}
	return errors.Join(os.Mkdir(filepath.Join(dir, "list"), 0o700), os.Symlink("0", filepath.Join(dir, "link")))
}

// number is n in the one width that overwrites the last one.
func number(n int) string { return fmt.Sprintf("%08d", n) }

// Exchange takes part in rounds 1 to last: in round n the party n%Parties
// changes every property, and then the others must see it. What another party
// wrote before it said so was written before it was read that it said so: an old
// value after that is as old as Staleness says, or older.
func (p *Party) Exchange(last int) ([]Staleness, error) {
	if last > MaxRounds {
		return nil, fmt.Errorf("%d rounds are more than %d", last, MaxRounds)
	}
	props, done, err := p.properties()
	if err != nil {
		return nil, err
	}
	defer done()
	for _, prop := range props {
		if prop.after != nil {
			prop.after(0)
		}
	}
	for n := 1; n <= last; n++ {
		writer := n % p.Parties
		if writer == p.Me {
			err = p.change(props, n)
		} else {
			err = p.look(props, n, writer)
		}
		if err != nil {
			return nil, fmt.Errorf("party %d, round %d of party %d: %w", p.Me, n, writer, err)
		}
	}
	out := make([]Staleness, len(props))
	for i, prop := range props {
		out[i] = prop.Staleness
	}
	return out, nil
}

// change makes the changes of round n when everybody has seen the last one.
func (p *Party) change(props []*property, n int) error {
	if err := p.awaitAll("ready", n-1); err != nil {
		return err
	}
	for _, prop := range p.exchanged(props, p.Me) {
		if err := prop.set(n); err != nil {
			return fmt.Errorf("%s: %w", prop.Property, err)
		}
		if got, err := prop.get(n); err != nil || got != n {
			return fmt.Errorf("%s: what I changed to %d gives %d, %v", prop.Property, n, got, err)
		}
	}
	if err := p.say("turn", n); err != nil {
		return err
	}
	return p.ready(props, n)
}

// ready looks at everything once more, when all have seen round n and what was
// kept has expired, and says that the next change may come: that is when a cache
// hides it the longest.
func (p *Party) ready(props []*property, n int) error {
	if err := p.say(fmt.Sprintf("seen.%d", p.Me), n); err != nil {
		return err
	}
	if p.Bound == 0 { // nothing is kept
		return p.say(fmt.Sprintf("ready.%d", p.Me), n)
	}
	if err := p.awaitAll("seen", n); err != nil {
		return err
	}
	time.Sleep(p.Bound)
	for _, prop := range p.exchanged(props, p.Me) {
		if _, err := prop.get(n); err != nil {
			return fmt.Errorf("%s: %w", prop.Property, err)
		}
		if prop.after != nil {
			prop.after(n)
		}
	}
	return p.say(fmt.Sprintf("ready.%d", p.Me), n)
}

// look waits for round n and until all its changes are seen.
func (p *Party) look(props []*property, n, writer int) error {
	since, err := p.await("turn", n)
	if err != nil {
		return err
	}
	all, late := p.exchanged(props, writer), map[*property]bool{}
	for pending := slices.Clone(all); len(pending) > 0; {
		pending = slices.DeleteFunc(pending, func(prop *property) bool {
			began := time.Since(since)
			got, getErr := prop.get(n)
			prop.Reads++
			switch {
			case getErr != nil:
				err = fmt.Errorf("%s: %w", prop.Property, getErr)
			case got == n:
				return true
			case began >= p.Bound && (p.Bound == 0 || late[prop]):
				err = fmt.Errorf("%s: a read begun %v after the change gives %d", prop.Property, began, got)
			}
			// A guest whose processor was away reads the time before its
			// kernel has counted the ticks: that happens once.
			late[prop] = began >= p.Bound
			prop.Old++
			prop.Longest = max(prop.Longest, began)
			return false
		})
		if err != nil {
			return err
		}
		if len(pending) > 0 {
			time.Sleep(time.Millisecond) // the others need the processor too
		}
	}
	for _, prop := range all { // and never the old value again
		if got, err := prop.get(n); err != nil || got != n {
			return fmt.Errorf("%s: goes back from %d to %d, %v", prop.Property, n, got, err)
		}
	}
	return p.ready(props, n)
}

// exchanged leaves out what this party and the writer cannot exchange.
func (p *Party) exchanged(props []*property, writer int) []*property {
	if p.Host < 0 || writer != p.Host && p.Me != p.Host {
		return props
	}
	return slices.DeleteFunc(slices.Clone(props), func(prop *property) bool { return prop.overlaid })
}

// awaitAll waits until all parties have come to a number.
func (p *Party) awaitAll(what string, n int) error {
	for i := range p.Parties {
		if _, err := p.await(fmt.Sprintf("%s.%d", what, i), n); err != nil {
			return err
		}
	}
	return nil
}

// await waits for a number of another party and returns a time before which it
// was written.
func (p *Party) await(name string, n int) (time.Time, error) {
	f, err := os.Open(filepath.Join(p.Exact, name))
	if err != nil {
		return time.Time{}, err
	}
	defer f.Close()
	b := make([]byte, len(number(0)))
	for began := time.Now(); ; {
		if _, err := f.ReadAt(b, 0); err != nil {
			return time.Time{}, fmt.Errorf("%s: %w", name, err)
		}
		seen := time.Now()
		if got, err := strconv.Atoi(string(b)); err != nil || got >= n {
			return seen, err
		}
		if seen.Sub(began) > partyPatience {
			return time.Time{}, fmt.Errorf("%s: still %s after %v, waiting for %d", name, b, partyPatience, n)
		}
		time.Sleep(time.Millisecond)
	}
}

// say tells the other parties a number.
func (p *Party) say(name string, n int) error {
	return overwrite(filepath.Join(p.Exact, name), number(n))
}

func overwrite(path, content string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt([]byte(content), 0)
	return errors.Join(err, f.Close())
}
