package writelog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"
)

const testDisk = 64 << 10

// encodeLog is the other direction of Parse, for 512-byte sectors.
func encodeLog(entries ...Entry) []byte {
	le := binary.LittleEndian
	b := make([]byte, minSector)
	le.PutUint64(b, logMagic)
	le.PutUint64(b[8:], logVersion)
	le.PutUint64(b[16:], uint64(len(entries)))
	le.PutUint32(b[24:], minSector)
	for _, e := range entries {
		head := make([]byte, minSector)
		le.PutUint64(head, uint64(e.Offset/minSector))
		le.PutUint64(head[8:], uint64(e.Length/minSector))
		for bit, set := range map[uint64]bool{flagFlush: e.Flush, flagFUA: e.FUA, flagDiscard: e.Discard, flagMark: e.Mark} {
			if set {
				le.PutUint64(head[16:], le.Uint64(head[16:])|bit)
			}
		}
		if e.Mark {
			le.PutUint64(head[24:], uint64(len(e.Data)))
		}
		b = append(append(b, head...), e.Data...)
		b = append(b, make([]byte, -len(b)&(minSector-1))...)
	}
	return b
}

func write(offset int64, fill byte, sectors int) Entry {
	return Entry{Offset: offset, Length: int64(sectors) * minSector, Data: bytes.Repeat([]byte{fill}, sectors*minSector)}
}

func TestParse(t *testing.T) {
	whole := encodeLog(write(0, 1, 1), Entry{Flush: true}, write(testDisk-1024, 2, 2),
		Entry{Offset: 512, Length: 1024, Discard: true}, Entry{Mark: true, Data: []byte("note")}, write(0, 3, 1))
	entries, err := Parse(whole, testDisk)
	if err != nil || len(entries) != 6 || !entries[1].Flush || entries[2].Data[0] != 2 ||
		!entries[3].Discard || string(entries[4].Data) != "note" || entries[5].Data[511] != 3 {
		t.Fatalf("Parse = %+v, %v", entries, err)
	}
	change := func(at int, v uint64) []byte {
		b := bytes.Clone(whole)
		binary.LittleEndian.PutUint64(b[at:], v)
		return b
	}
	for name, b := range map[string][]byte{
		"empty":            nil,
		"magic":            change(0, 1),
		"version":          change(8, 2),
		"too many entries": change(16, 7),
		"huge count":       change(16, 1<<63),
		"sector size 0":    change(24, 0),
		"sector size odd":  change(24, 513),
		"outside":          change(512, testDisk/512),
		"offset overflow":  change(512, 1<<63),
		"length overflow":  change(520, 1<<62),
		"unknown flag":     change(528, 1<<4),
		"huge note":        change(536, 1<<40),
		"cut short":        whole[:len(whole)-1],
		"header cut short": whole[:minSector+16],
	} {
		if _, err := Parse(b, testDisk); !errors.Is(err, errLog) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// FuzzParse: a log is foreign bytes. It may be refused; entries that are
// accepted lie within the disk and within the log.
func FuzzParse(f *testing.F) {
	f.Add(encodeLog(write(0, 1, 1), Entry{Flush: true}, Entry{Offset: 512, Length: 512, Discard: true}))
	f.Add(encodeLog(Entry{Mark: true, Data: []byte("note")}))
	f.Fuzz(func(t *testing.T, b []byte) {
		entries, err := Parse(b, testDisk)
		if err != nil {
			return
		}
		for i, e := range entries {
			if e.Offset < 0 || e.Length < 0 || e.Offset+e.Length > testDisk || (e.Writes() && !e.Discard && int64(len(e.Data)) != e.Length) {
				t.Fatalf("entry %d: %d bytes at %d, %d of data", i, e.Length, e.Offset, len(e.Data))
			}
		}
		m := NewImage(make([]byte, testDisk), entries)
		for _, c := range RandomCuts(entries, 3, 1) {
			m.At(c, func([]byte) {})
		}
	})
}

func TestImage(t *testing.T) {
	log := []Entry{
		write(0, 1, 2), {Flush: true}, {Flush: true}, write(512, 2, 2), write(2048, 3, 1),
		{Offset: 0, Length: 512, Discard: true}, {Flush: true}, write(0, 4, 8),
	}
	if got := FlushCuts(log); len(got) != 2 || got[0].Flushed != 2 || got[1].Flushed != 7 {
		t.Errorf("FlushCuts = %+v", got)
	}
	cuts := RandomCuts(log, 400, 7)
	if len(cuts) != 400 {
		t.Fatalf("%d cuts", len(cuts))
	}
	m := NewImage(make([]byte, testDisk), log)
	lost, kept, torn := 0, 0, 0
	for _, c := range cuts {
		if c.Flushed > 3 {
			break // judged below
		}
		m.At(c, func(disk []byte) {
			if c.Flushed == 3 && disk[0] != 1 && c.Issued < 6 {
				t.Errorf("cut %+v: what was flushed is %d", c, disk[0])
			}
			switch a, b := disk[512], disk[1024]; {
			case c.Issued < 4 || c.Flushed < 3:
			case a == 2 && b == 2:
				kept++
			case a == 2 || b == 2:
				torn++
			default:
				lost++
			}
		})
	}
	if lost == 0 || kept == 0 || torn == 0 {
		t.Errorf("lost %d, kept %d, torn %d", lost, kept, torn)
	}
	m.At(Cut{Flushed: 7, Issued: 7}, func(disk []byte) {
		if disk[0] != 0 || disk[512] != 2 || disk[1535] != 2 || disk[2048] != 3 || disk[1536] != 0 {
			t.Errorf("after the last flush: %d %d %d %d %d", disk[0], disk[512], disk[1535], disk[2048], disk[1536])
		}
	})
}
