package server

import (
	"container/heap"
	"slices"
	"strings"
)

// page keeps the first rows by key after a given one, of rows that come in any order,
// in memory that does not grow with their number.
type page[R any] struct {
	size  int
	after string
	kept  rowHeap[R] // the greatest key on top
	more  bool
}

type row[R any] struct {
	key string
	row R
}

func newPage[R any](size int, after string) *page[R] { return &page[R]{size: size, after: after} }

func (p *page[R]) add(key string, r R) {
	switch {
	case key <= p.after && p.after != "":
	case len(p.kept) < p.size:
		heap.Push(&p.kept, row[R]{key, r})
	default:
		p.more = true
		if key < p.kept[0].key {
			p.kept[0] = row[R]{key, r}
			heap.Fix(&p.kept, 0)
		}
	}
}

// rows are what is kept, by key.
func (p *page[R]) rows() []R {
	sorted := slices.SortedFunc(slices.Values(p.kept), func(a, b row[R]) int { return strings.Compare(a.key, b.key) })
	rows := make([]R, len(sorted))
	for i, r := range sorted {
		rows[i] = r.row
	}
	return rows
}

// rowHeap implements heap.Interface.
type rowHeap[R any] []row[R]

func (h rowHeap[R]) Len() int           { return len(h) }
func (h rowHeap[R]) Less(i, j int) bool { return h[i].key > h[j].key }
func (h rowHeap[R]) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *rowHeap[R]) Push(x any)        { *h = append(*h, x.(row[R])) }

func (h *rowHeap[R]) Pop() any {
	last := len(*h) - 1
	r := (*h)[last]
	*h = (*h)[:last]
	return r
}
