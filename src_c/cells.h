/* The registry of cells. A cell has a line here and a page in cells/, which template.h includes; the page defines
 * NAME_CELL, the descriptor, and NAME_UPDATES, its functions. */
#define CELLS(CELL)                                                                                                     \
    CELL(LSTM) CELL(LSTM_PEEPHOLE) CELL(LSTM_COUPLED) CELL(LSTM_NORM) CELL(SLSTM)                                       \
    CELL(GRU) CELL(GRU_RESET_BEFORE) CELL(RNN)
