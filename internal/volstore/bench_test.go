package volstore

import (
	"fmt"
	"testing"

	"github.com/microsandbox-go/microsandbox/internal/home"
)

func benchStore(b *testing.B, volumes int) *Store {
	b.Helper()
	s := New(home.Dir(b.TempDir()))
	b.Cleanup(func() { s.Close() })
	for i := range volumes {
		mustCreate(b, s, Spec{Name: fmt.Sprint("v", i), Labels: map[string]string{"team": "a"}})
	}
	return s
}

func BenchmarkCreate(b *testing.B) {
	s := benchStore(b, 1)
	for i := 0; b.Loop(); i++ {
		mustCreate(b, s, Spec{Name: fmt.Sprint("n", i)})
	}
}

func BenchmarkCreateRemove(b *testing.B) {
	s := benchStore(b, 1)
	for b.Loop() {
		mustCreate(b, s, Spec{Name: "n"})
		if err := s.Remove(b.Context(), "n"); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCreateDisk1GiB(b *testing.B) {
	needMkfs(b)
	s := benchStore(b, 1)
	for i := 0; b.Loop(); i++ {
		mustCreate(b, s, Spec{Name: fmt.Sprint("n", i), Kind: KindDisk, SizeMiB: 1024})
	}
}

func BenchmarkGet(b *testing.B) {
	s := benchStore(b, 100)
	for b.Loop() {
		if _, err := s.Get(b.Context(), "v42"); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkList1000(b *testing.B) {
	s := benchStore(b, 1000)
	for b.Loop() {
		if all, err := s.List(b.Context(), Filter{}); err != nil || len(all) != 1000 {
			b.Fatal(len(all), err)
		}
	}
}

func BenchmarkAlive(b *testing.B) {
	s := benchStore(b, 1)
	v, err := s.Get(b.Context(), "v0")
	if err != nil {
		b.Fatal(err)
	}
	d, err := s.OpenData(b.Context(), v.ID)
	if err != nil {
		b.Fatal(err)
	}
	defer d.Close()
	for b.Loop() {
		if err := d.Alive(); err != nil {
			b.Fatal(err)
		}
	}
}
