package node

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/entente-mesh/entente/ca/local"
	"github.com/entente-mesh/entente/internal/daemon"
)

// bansFile is this node's own memory, beside the agreed state, of agents that were shut
// out: by this node alone while nothing could be agreed, and by agreement, which a
// restore from a backup would forget. It only grows, a line at a time, each on disk
// before it counts; the last line of an agent is the one that holds. A node that is
// wiped may be given it back, or another's.
const bansFile = "bans.journal"

const (
	maxBansFile = 64 << 20
	maxBanLine  = 4 << 10
	// bansStall is how long a line may take to reach the disk.
	bansStall = 2 * time.Second
)

var crcTable = crc32.MakeTable(crc32.Castagnoli)

// journalLine is a ban as it stands in the journal.
func journalLine(b local.Ban) ([]byte, error) {
	text, err := json.Marshal(b)
	if err != nil {
		return nil, err
	}
	return fmt.Appendf(nil, "%08x %s\n", crc32.Checksum(text, crcTable), text), nil
}

func parseBan(line []byte) (b local.Ban, err error) {
	sum, text, ok := bytes.Cut(line, []byte(" "))
	want, err := strconv.ParseUint(string(sum), 16, 32)
	if !ok || len(sum) != 8 || err != nil || uint32(want) != crc32.Checksum(text, crcTable) {
		return local.Ban{}, errors.New("its checksum is wrong")
	}
	if err := json.Unmarshal(text, &b); err != nil {
		return local.Ban{}, err
	}
	return b, b.Check()
}

// readBans reads lines and calls each for them. It returns how many bytes are whole
// lines: what follows was being written when the process or the machine ended, and
// nobody was told that it counts.
func readBans(r io.Reader, each func(local.Ban)) (size int64, err error) {
	lines := bufio.NewReaderSize(io.LimitReader(r, maxBansFile+1), maxBanLine)
	for n := 1; ; n++ {
		line, err := lines.ReadSlice('\n')
		switch {
		case errors.Is(err, io.EOF):
			return size, nil
		case err == nil && size+int64(len(line)) > maxBansFile:
			err = fmt.Errorf("over %d bytes", maxBansFile)
		}
		var b local.Ban
		if err == nil {
			b, err = parseBan(bytes.TrimSuffix(line, []byte("\n")))
		}
		if err != nil {
			return size, fmt.Errorf("line %d: %w", n, err)
		}
		size += int64(len(line))
		each(b)
	}
}

// bans is the journal and what stands in it. Methods may be called concurrently.
type bans struct {
	path  string
	check func() error // before each write; nil: nothing
	slot  chan struct{}

	file *os.File // used by whoever holds slot
	size int64

	mu    sync.Mutex
	known map[string]local.Ban // by agent
	// unwritten are those of known that are not on disk, and why.
	unwritten map[string]error
}

func openBans(dir string, check func() error) (_ *bans, err error) {
	b := &bans{
		path: filepath.Join(dir, bansFile), check: check, slot: make(chan struct{}, 1),
		known: make(map[string]local.Ban), unwritten: make(map[string]error),
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("the memory of bans, %s: %w; if it cannot be mended, move it away: bans that were agreed on are in the state, those made at this node alone may be lost", b.path, err)
		}
	}()
	b.file, err = os.OpenFile(b.path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	lines := 0
	b.size, err = readBans(b.file, func(line local.Ban) {
		lines++
		b.remember(line)
	})
	if err == nil {
		err = b.file.Truncate(b.size)
	}
	if err == nil && lines > 2*len(b.known)+1000 {
		err = b.compact()
	}
	if err != nil {
		b.file.Close()
		return nil, err
	}
	return b, nil
}

// compact writes what holds into a new file.
func (b *bans) compact() error {
	var text bytes.Buffer
	for _, name := range slices.Sorted(maps.Keys(b.known)) {
		line, err := journalLine(b.known[name])
		if err != nil {
			return err
		}
		text.Write(line)
	}
	if err := daemon.WriteFileAtomic(b.path, text.Bytes(), 0o600); err != nil {
		return err
	}
	b.file.Close()
	b.size = int64(text.Len())
	var err error
	b.file, err = os.OpenFile(b.path, os.O_RDWR, 0o600)
	return err
}

// remember keeps the later word on an agent: that on the later attestation.
func (b *bans) remember(line local.Ban) {
	if have, ok := b.known[line.Agent]; !ok || have.Cluster != line.Cluster || line.Generation >= have.Generation {
		b.known[line.Agent] = line
	}
}

// add takes a ban down. It counts in any case; an error says that it is not on disk yet.
func (b *bans) add(line local.Ban) error {
	err := b.write(line)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.remember(line)
	if delete(b.unwritten, line.Agent); err != nil {
		b.unwritten[line.Agent] = err
	}
	return err
}

// write returns when the line is on disk, or when it seems that this may take for ever.
func (b *bans) write(line local.Ban) error {
	text, err := journalLine(line)
	if err != nil {
		return err
	}
	if len(text) > maxBanLine {
		return fmt.Errorf("the ban takes %d bytes, over %d", len(text), maxBanLine)
	}
	patience := time.NewTimer(bansStall)
	defer patience.Stop()
	select {
	case b.slot <- struct{}{}:
	case <-patience.C:
		return errors.New("the disk hangs")
	}
	done := make(chan error, 1)
	go func() { // ends with the disk's answer
		defer func() { <-b.slot }()
		done <- b.append(text)
	}()
	select {
	case err := <-done:
		return err
	case <-patience.C:
		return errors.New("the disk hangs")
	}
}

func (b *bans) append(text []byte) error {
	if b.check != nil {
		if err := b.check(); err != nil {
			return err
		}
	}
	_, err := b.file.WriteAt(text, b.size)
	if err == nil {
		err = b.file.Sync()
	}
	if err != nil {
		// What stands there of it must not be read as a damaged line.
		return errors.Join(err, b.file.Truncate(b.size))
	}
	b.size += int64(len(text))
	return nil
}

// rewrite tries again to put on disk what is not.
func (b *bans) rewrite() {
	b.mu.Lock()
	var lines []local.Ban
	for name := range b.unwritten {
		lines = append(lines, b.known[name])
	}
	b.mu.Unlock()
	for _, line := range lines {
		if b.add(line) != nil {
			return
		}
	}
}

// all returns what holds, by agent, and why it is not on disk.
func (b *bans) all() (list []local.Ban, unwritten map[string]error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(b.known)) {
		list = append(list, b.known[name])
	}
	return list, maps.Clone(b.unwritten)
}

// Close ends the writing; of a disk that hangs it does not wait.
func (b *bans) Close() error {
	select {
	case b.slot <- struct{}{}:
		defer func() { <-b.slot }()
		return b.file.Close()
	case <-time.After(bansStall):
		return fmt.Errorf("%s: the disk hangs", b.path)
	}
}

// importBans adds what other nodes remember to the memory of a node that does not run.
func importBans(dir string, files []string) error {
	own, err := openBans(dir, nil)
	if err != nil {
		return err
	}
	defer own.Close()
	for _, path := range files {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		var others []local.Ban
		_, err = readBans(f, func(line local.Ban) { others = append(others, line) })
		f.Close()
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		for _, line := range others {
			if have, ok := own.known[line.Agent]; ok && have.Cluster == line.Cluster && (have.Generation > line.Generation || have.Generation == line.Generation && have.Revision >= line.Revision) {
				continue
			}
			if err := own.add(line); err != nil {
				return err
			}
		}
	}
	return nil
}
