package daemon

import (
	"crypto/tls"
	"os"
	"sync"
	"time"
)

// followEvery is how often Followed looks at its files.
const followEvery = time.Second

// Followed is a value that is made of files, and made anew when one of them changes. Files that went bad, or do not fit
// together while they are being replaced, leave the last good value in use. Get may be called concurrently.
type Followed[T any] struct {
	read  func() (T, error)
	files []string

	mu     sync.Mutex // guards what follows
	good   bool       // value was read
	value  T
	times  []time.Time // of the files as they were read
	looked time.Time
}

// Follow makes a value that read makes of files. Nothing is read yet.
func Follow[T any](read func() (T, error), files ...string) *Followed[T] {
	return &Followed[T]{read: read, files: files}
}

// Get returns the newest good value; an error only if there never was one.
func (f *Followed[T]) Get() (T, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	if f.good && now.Sub(f.looked) < followEvery {
		return f.value, nil
	}
	f.looked = now
	times := make([]time.Time, len(f.files)) // zero: not there
	changed := !f.good
	for i, name := range f.files {
		if info, err := os.Stat(name); err == nil {
			times[i] = info.ModTime()
		}
		changed = changed || !times[i].Equal(f.times[i])
	}
	if !changed {
		return f.value, nil
	}
	value, err := f.read()
	if err == nil {
		f.value, f.good, f.times = value, true, times
	} else if !f.good {
		return f.value, err
	}
	return f.value, nil
}

// FollowKeyPair follows a certificate and its key.
func FollowKeyPair(certFile, keyFile string) *Followed[*tls.Certificate] {
	return Follow(func() (*tls.Certificate, error) {
		pair, err := tls.LoadX509KeyPair(certFile, keyFile)
		return &pair, err
	}, certFile, keyFile)
}
