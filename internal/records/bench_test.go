package records

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/home"
)

func benchHome(b *testing.B, volumes int) (*DB, home.Dir) {
	b.Helper()
	h := home.Dir(b.TempDir())
	d, err := Open(context.Background(), h)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { d.Close() })
	err = d.update(context.Background(), "fill", func(q querier) error {
		for i := range volumes {
			_, err := q.exec("INSERT INTO volume ("+volumeColumns+") VALUES ($1,$2,'dir',0,0,'','',$3,$4,1,2,3,'')",
				fmt.Sprintf("01HZZZZZZZZZZZZZZZZZ%06d", i), fmt.Sprintf("volume-%06d", i), `{"team":"a"}`, time.Now().UnixNano())
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
	return d, h
}

func BenchmarkInsertDelete(b *testing.B) {
	d, _ := benchHome(b, 100)
	i := 0
	for b.Loop() {
		i++
		v := &Volume{ID: fmt.Sprintf("id-%d", i), Name: fmt.Sprintf("v%d", i), Kind: "dir", CreatedAt: time.Now()}
		if err := d.InsertVolume(b.Context(), v); err != nil {
			b.Fatal(err)
		}
		if err := d.DeleteVolume(b.Context(), v, v.ID); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkGet(b *testing.B) {
	for _, n := range []int{100, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			d, _ := benchHome(b, n)
			for b.Loop() {
				if _, err := d.VolumeByName(b.Context(), "volume-000042"); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkList(b *testing.B) {
	for _, n := range []int{1000, 10_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			d, _ := benchHome(b, n)
			for b.Loop() {
				if _, err := d.ListVolumes(b.Context()); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkNewHome(b *testing.B) {
	for b.Loop() {
		b.StopTimer()
		h := home.Dir(b.TempDir())
		b.StartTimer()
		d, err := Open(b.Context(), h)
		if err != nil {
			b.Fatal(err)
		}
		d.Close()
	}
}
