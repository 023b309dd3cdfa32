package daemon

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// A value is made anew when one of its files changes; a bad or half replaced pair leaves
// the last good one.
func TestFollow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		one, other := filepath.Join(dir, "one"), filepath.Join(dir, "other")
		stamp := time.Unix(1700000000, 0)
		write := func(path, text string) {
			t.Helper()
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			stamp = stamp.Add(time.Second)
			if err := os.Chtimes(path, stamp, stamp); err != nil {
				t.Fatal(err)
			}
		}
		reads := 0
		f := Follow(func() (string, error) {
			reads++
			a, err := os.ReadFile(one)
			if err != nil {
				return "", err
			}
			b, err := os.ReadFile(other)
			if err == nil && string(a) != strings.ToUpper(string(b)) {
				err = errBroken
			}
			return string(a), err
		}, one, other)
		expect := func(want string, wantReads int) {
			t.Helper()
			got, err := f.Get()
			if got != want || (err == nil) != (want != "") || reads != wantReads {
				t.Errorf("%q, %v after %d reads; want %q after %d", got, err, reads, want, wantReads)
			}
		}
		expect("", 1)
		write(one, "A")
		write(other, "a")
		expect("A", 2) // at once, as there was nothing
		write(one, "B")
		expect("A", 2)
		time.Sleep(followEvery)
		expect("A", 3) // half of the pair is no pair
		write(other, "b")
		time.Sleep(followEvery)
		expect("B", 4)
		time.Sleep(followEvery)
		expect("B", 4) // nothing changed
		os.Remove(one)
		time.Sleep(followEvery)
		expect("B", 5)
	})
}
