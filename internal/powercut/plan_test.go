package powercut

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
)

// step is one operation of the guest. Steps are numbered from 1.
type step struct {
	seq      int
	kind     string // see steps
	name, to string // volumes
	path     string // in the volume
	pathTo   string
	size     int // bytes
	durable  bool
	command  bool // by the msb command, where the guest has it
}

func (s step) String() string {
	return fmt.Sprintf("%d: %s %s:%s %s:%s size %d durable %t command %t", s.seq, s.kind, s.name, s.path, s.to, s.pathTo, s.size, s.durable, s.command)
}

// world is what a home may hold: volumes by name, and directories that belong
// to none yet.
type world struct {
	volumes   map[string]*volume
	strangers map[string]bool
}

// volume is a volume of the plan. Its label "made" says which of a name it is.
type volume struct {
	made, tag int // numbers of the steps that created and last labelled it
	group     string
	disk      bool
	files     map[string]*file
	moves     []move
}

// move is a rename whose file was durable: it is there under one of its names
// until something else happens to them.
type move struct {
	content int
	paths   [2]string
}

// file is a path that has been used. Contents are known by the number of the
// step that made them; 0 is no file.
type file struct {
	latest int
	may    map[int]bool // what is allowed after a power cut
}

func (w world) clone() world {
	c := world{map[string]*volume{}, maps.Clone(w.strangers)}
	for name, v := range w.volumes {
		v2 := *v
		v2.moves = slices.Clone(v.moves)
		v2.files = map[string]*file{}
		for path, f := range v.files {
			v2.files[path] = &file{f.latest, maps.Clone(f.may)}
		}
		c.volumes[name] = &v2
	}
	return c
}

// at returns the file with a path, which nothing has been written to perhaps.
func (v *volume) at(path string) *file {
	if v.files[path] == nil {
		v.files[path] = &file{may: map[int]bool{0: true}}
	}
	return v.files[path]
}

// put is a write that has returned: only a durable one rules the old out.
func (f *file) put(content int, durable bool) {
	if durable {
		f.may = map[int]bool{}
	}
	f.latest, f.may[content] = content, true
}

// touch forgets the moves that a step on a path makes history.
func (v *volume) touch(path string) {
	v.moves = slices.DeleteFunc(v.moves, func(m move) bool { return slices.Contains(m.paths[:], path) })
}

// move is a rename that has returned.
func (v *volume) move(s step) {
	from, to := v.at(s.path), v.at(s.pathTo)
	if len(from.may) == 1 && from.latest != 0 {
		v.moves = append(v.moves, move{from.latest, [2]string{s.path, s.pathTo}})
	}
	to.put(from.latest, s.durable)
	from.put(0, s.durable)
}

// after returns the state once a step has been acknowledged.
func (w world) after(s step) world {
	w = w.clone()
	v := w.volumes[s.name]
	if s.path != "" {
		v.touch(s.path)
		v.touch(s.pathTo)
	}
	switch s.kind {
	case "create", "create-disk":
		w.volumes[s.name] = &volume{made: s.seq, group: groupOf(s), disk: s.kind == "create-disk", files: map[string]*file{}}
	case "adopt":
		v = &volume{made: s.seq, group: groupOf(s), files: map[string]*file{}}
		v.at("old").put(s.seq, true)
		w.volumes[s.name] = v
		delete(w.strangers, s.name)
	case "remove":
		delete(w.volumes, s.name)
	case "rename":
		delete(w.volumes, s.name)
		w.volumes[s.to] = v
	case "label":
		v.tag = s.seq
	case "prune":
		maps.DeleteFunc(w.volumes, func(_ string, v *volume) bool { return v.group == s.to })
	case "write", "stream":
		v.at(s.path).put(s.seq, s.durable)
	case "copy":
		v.at(s.pathTo).put(v.at(s.path).latest, s.durable)
	case "move":
		v.move(s)
	case "delete":
		v.at(s.path).put(0, false)
	}
	return w
}

// during returns the states that a step may leave when it is cut short.
func (w world) during(s step) []world {
	after := w.after(s)
	switch s.kind {
	case "create", "create-disk", "remove", "rename", "label":
		return []world{w, after}
	case "adopt":
		found := w.clone()
		found.strangers[s.name] = true
		return []world{w, found, after}
	case "prune": // each volume for itself
		out := []world{w}
		for name, v := range w.volumes {
			if v.group != s.to {
				continue
			}
			for _, one := range slices.Clone(out) {
				one = one.clone()
				delete(one.volumes, name)
				out = append(out, one)
			}
		}
		return out
	}
	// Files: old or new, each for itself.
	both := w.clone()
	both.volumes[s.name].moves = after.volumes[s.name].moves
	for path, f := range after.volumes[s.name].files {
		maps.Copy(both.volumes[s.name].at(path).may, f.may)
	}
	return []world{both}
}

func groupOf(s step) string { return []string{"even", "odd"}[s.seq%2] }

// plan is what a guest does, the same for the same seed.
type plan struct {
	steps []step
	sizes []int // of contents, by number
}

var (
	volumeNames = []string{"a", "b", "c", "d", "e"}
	filePaths   = []string{"f", "g", "d/f", "d/e/g"}
)

const maxVolumes = 4

// steps says how often each kind of step comes, relative to the others.
var stepKinds = []struct {
	kind   string
	weight int
}{
	{"create", 6}, {"create-disk", 1}, {"remove", 2}, {"rename", 3}, {"label", 3}, {"adopt", 2}, {"prune", 1},
	{"write", 14}, {"stream", 6}, {"copy", 2}, {"move", 3}, {"delete", 1},
}

// newPlan returns n steps. The first ones are of every kind, so that a short
// plan has them all.
func newPlan(seed uint64, n int) plan {
	g := &generator{r: rand.New(rand.NewPCG(seed, 1)), w: world{map[string]*volume{}, map[string]bool{}}}
	p := plan{sizes: make([]int, n+1)}
	add := func(s step) {
		s.seq = len(p.steps) + 1
		if s.kind == "adopt" {
			s.size = 5000
		}
		if s.kind == "copy" || s.kind == "move" {
			s.command = s.command && !s.durable // msb has no such flag
		}
		p.sizes[s.seq] = s.size
		p.steps = append(p.steps, s)
		g.w = g.w.after(s)
	}
	for _, s := range overture {
		if len(p.steps) < n {
			add(s)
		}
	}
	for len(p.steps) < n {
		if s, ok := g.step(); ok {
			add(s)
		}
	}
	return p
}

// overture has every kind of step, by the library and by the command.
var overture = []step{
	{kind: "create", name: "a", command: true},
	{kind: "write", name: "a", path: "f", size: 3 << 20, durable: true},
	{kind: "write", name: "a", path: "d/e/g", size: 700},
	{kind: "create", name: "b"},
	{kind: "write", name: "a", path: "f", size: 3<<20 + 17},
	{kind: "stream", name: "b", path: "g", size: 9<<20 + 4097},
	{kind: "rename", name: "a", to: "c"},
	{kind: "stream", name: "c", path: "f", size: 2 << 20, durable: true, command: true},
	{kind: "label", name: "c"},
	{kind: "adopt", name: "a", command: true},
	{kind: "copy", name: "b", path: "g", pathTo: "f", durable: true},
	{kind: "write", name: "a", path: "old", size: 20_000},
	{kind: "move", name: "c", path: "f", pathTo: "d/f", durable: true},
	{kind: "remove", name: "b"},
	{kind: "create-disk", name: "d"},
	{kind: "create", name: "b", command: true},
	{kind: "rename", name: "b", to: "e", command: true},
	{kind: "write", name: "e", path: "d/e/g", size: 1, durable: true},
	{kind: "delete", name: "c", path: "d/e/g"},
	{kind: "remove", name: "a", command: true},
	{kind: "create-disk", name: "a", command: true}, // from what the first left
	{kind: "label", name: "e", command: true},
	{kind: "write", name: "e", path: "d/e/g", size: 5 << 20},
	{kind: "prune", to: "odd"},
}

// generator draws steps that will succeed.
type generator struct {
	r *rand.Rand
	w world
}

func (g *generator) step() (step, bool) {
	s := step{kind: g.kind(), durable: g.r.IntN(2) == 0, command: g.r.IntN(6) == 0}
	taken := slices.Sorted(maps.Keys(g.w.volumes))
	free := slices.DeleteFunc(slices.Clone(volumeNames), func(n string) bool { return g.w.volumes[n] != nil })
	switch s.kind {
	case "create", "create-disk", "adopt":
		s.name = g.pick(free)
		return s, len(taken) < maxVolumes
	case "prune":
		s.to = g.pick([]string{"even", "odd"})
		return s, len(taken) >= maxVolumes-1
	case "remove", "label", "rename":
		if s.kind == "rename" {
			s.to = g.pick(free)
		}
		s.name = g.pick(taken)
		return s, s.name != ""
	}
	taken = slices.DeleteFunc(taken, func(n string) bool { return g.w.volumes[n].disk })
	if s.name = g.pick(taken); s.name == "" {
		return s, false
	}
	return g.fileStep(s)
}

func (g *generator) fileStep(s step) (step, bool) {
	v := g.w.volumes[s.name]
	s.path = g.pick(filePaths)
	switch s.kind {
	case "write", "stream":
		s.size = 1 + g.r.IntN(20_000)
		if g.r.IntN(4) == 0 {
			s.size = 1<<20 + g.r.IntN(2<<20)
		}
		return s, true
	case "copy", "move":
		s.pathTo = g.pick(filePaths)
		from, to := v.at(s.path), v.at(s.pathTo)
		// A file moved onto its own other content would be told apart by nothing.
		return s, from.latest != 0 && from.latest != to.latest
	}
	return s, v.at(s.path).latest != 0
}

func (g *generator) kind() string {
	total := 0
	for _, k := range stepKinds {
		total += k.weight
	}
	n := g.r.IntN(total)
	for _, k := range stepKinds {
		if n -= k.weight; n < 0 {
			return k.kind
		}
	}
	panic("unreachable")
}

func (g *generator) pick(of []string) string {
	if len(of) == 0 {
		return ""
	}
	return of[g.r.IntN(len(of))]
}

// content returns the bytes with a number: no zeros in a row, nothing that
// another number has.
func content(number, size int) []byte {
	b := make([]byte, size+8)
	le := binary.LittleEndian
	x := uint64(number)*0x9e3779b97f4a7c15 + 1
	for i := 0; i < size; i += 8 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		le.PutUint64(b[i:], x|0x0101010101010101)
	}
	return b[:size]
}

// numberOf returns which content of those allowed the bytes are.
func (p plan) numberOf(b []byte, may map[int]bool) (int, bool) {
	for n := range may {
		if n != 0 && may[n] && len(b) == p.sizes[n] && bytes.Equal(b, content(n, p.sizes[n])) {
			return n, true
		}
	}
	return 0, false
}

// describe says what bytes are that should not be.
func (p plan) describe(b []byte) string {
	all := map[int]bool{}
	for n, size := range p.sizes {
		all[n] = size > 0
	}
	if n, ok := p.numberOf(b, all); ok {
		return fmt.Sprintf("the content of step %d", n)
	}
	zeros := bytes.Count(b, []byte{0})
	return fmt.Sprintf("%d bytes of no step, %d of them zero", len(b), zeros)
}
